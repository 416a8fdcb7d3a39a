"""From a picture to what a model sees: preprocessing, geometry, augmentation, mixing."""
