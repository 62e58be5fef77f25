"""Hugging Face files: checkpoints and adapters."""

from jpeft.hf.adapters import load_adapter as load_adapter
from jpeft.hf.adapters import save_adapter as save_adapter
from jpeft.hf.checkpoints import load_bert as load_bert
from jpeft.hf.checkpoints import load_sequence_classifier as load_sequence_classifier
from jpeft.hf.checkpoints import save_sequence_classifier as save_sequence_classifier
from jpeft.hf.files import CheckpointError as CheckpointError
from jpeft.hf.loralib import load_loralib as load_loralib
from jpeft.hf.models import load_model as load_model
from jpeft.hf.models import save_model as save_model
from jpeft.hf.models import save_quantized as save_quantized
from jpeft.hf.names import Family as Family
from jpeft.hf.params import LoadReport as LoadReport
