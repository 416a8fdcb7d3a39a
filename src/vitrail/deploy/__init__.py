"""A trained model at work: wrappers around it, which never change it.

Nothing that is needed to ask an exported model imports torch.
"""

from vitrail.deploy.predict import Predictor as Predictor
