"""The rooms behind `mscnn_helpers`, one subject each; a room imports only from those above it (see CONTRIBUTING)."""
