"""A network of one's own, in a file of its own, so that another process can import it."""

import keras


@keras.saving.register_keras_serializable("mine")
class Mine(keras.Model):
    """Two convolutions with BatchNormalization, and a dense layer."""

    def __init__(self, categories, **kwargs):
        super().__init__(**kwargs)
        self.categories = categories
        self.parts = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(8, 3, strides=2),
                      keras.layers.BatchNormalization(), keras.layers.ReLU(), keras.layers.Conv2D(8, 3, strides=2),
                      keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(categories)]  # fmt: skip

    def call(self, images, training=False):
        for part in self.parts:
            images = part(images, training=training) if "batch" in part.name else part(images)
        return images

    def get_config(self):
        return {**super().get_config(), "categories": self.categories}
