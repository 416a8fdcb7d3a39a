"""From a backbone's features to what a task asks for; one head, one file."""

from vitrail.heads.detector import DetectHeadConfig as DetectHeadConfig
from vitrail.heads.detector import Detector as Detector
from vitrail.heads.detector import build_detector as build_detector
from vitrail.heads.projector import Predictor as Predictor
from vitrail.heads.projector import Projector as Projector
from vitrail.heads.queries import Prediction as Prediction
from vitrail.heads.segmenter import Segmenter as Segmenter
from vitrail.heads.segmenter import SegmentHeadConfig as SegmentHeadConfig
from vitrail.heads.segmenter import build_segmenter as build_segmenter
