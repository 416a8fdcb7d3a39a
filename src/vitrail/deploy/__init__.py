"""A trained model at work: wrappers around it, which never change it."""

from vitrail.deploy.predict import Predictor as Predictor
