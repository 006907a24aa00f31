"""Training: the Lightning module, callbacks, schedules, optimisers."""

from liplayers.extras import extra

with extra("train"):
    from liplayers.training.callbacks import EpochLines as EpochLines
    from liplayers.training.callbacks import EpsilonRamp as EpsilonRamp
    from liplayers.training.callbacks import LookaheadSync as LookaheadSync
    from liplayers.training.callbacks import ProgressBar as ProgressBar
    from liplayers.training.callbacks import SaveWhenInterrupted as SaveWhenInterrupted
    from liplayers.training.callbacks import Stopped as Stopped
    from liplayers.training.callbacks import Throughput as Throughput
    from liplayers.training.callbacks import ValidateAtEnd as ValidateAtEnd
    from liplayers.training.callbacks import WeightEMA as WeightEMA
    from liplayers.training.decay import kernel_decay as kernel_decay
    from liplayers.training.lookahead import Lookahead as Lookahead
    from liplayers.training.manifold import ManifoldAdamW as ManifoldAdamW
    from liplayers.training.manifold import ManifoldMuon as ManifoldMuon
    from liplayers.training.memory import keep_freed_memory as keep_freed_memory
    from liplayers.training.module import CertifiedClassifier as CertifiedClassifier
    from liplayers.training.resuming import MovedRun as MovedRun
    from liplayers.training.resuming import check_training_state as check_training_state
    from liplayers.training.saving import SaveWithinEpoch as SaveWithinEpoch
    from liplayers.training.saving import WholeFileCheckpointIO as WholeFileCheckpointIO
    from liplayers.training.schedules import constant as constant
    from liplayers.training.schedules import triangular as triangular
    from liplayers.training.schedules import warmup_cosine as warmup_cosine
