"""The public names of secateur.learned and where they live, as in `secateur/__init__.pyi`."""

from secateur.learned.layers.layer_gates import LayerGates as LayerGates
from secateur.learned.multitask.encoder_tasks import Classification as Classification
from secateur.learned.multitask.encoder_tasks import Regression as Regression
from secateur.learned.multitask.encoder_tasks import Span as Span
from secateur.learned.multitask.exporting import export as export
from secateur.learned.multitask.exporting import load as load
from secateur.learned.multitask.exporting import save as save
from secateur.learned.multitask.mixture import best as best
from secateur.learned.multitask.mixture import frontier as frontier
from secateur.learned.multitask.model import MultitaskModel as MultitaskModel
from secateur.learned.multitask.pruning import MultitaskPruning as MultitaskPruning
from secateur.learned.multitask.pruning import attribution_scores as attribution_scores
from secateur.learned.multitask.pruning import magnitude_scores as magnitude_scores
from secateur.learned.multitask.schedule import CubicSchedule as CubicSchedule
from secateur.learned.multitask.training import evaluate_task as evaluate_task
from secateur.learned.multitask.training import features_of as features_of
from secateur.learned.multitask.training import train as train
