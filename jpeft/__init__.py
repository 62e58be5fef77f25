"""Parameter-efficient fine-tuning as pure transforms of a parameter tree, for any JAX model."""

from jpeft._disk import CheckpointError as CheckpointError
from jpeft.files import load as load
from jpeft.files import save as save
from jpeft.functional import Functional as Functional
from jpeft.functional import Stateful as Stateful
from jpeft.functional import functional as functional
from jpeft.functional import stateful as stateful
from jpeft.leaf import Leaf as Leaf
from jpeft.leaf import LeafError as LeafError
from jpeft.leaf import Site as Site
from jpeft.leaf import Weight as Weight
from jpeft.leaf import is_leaf as is_leaf
from jpeft.lora import Factors as Factors
from jpeft.lora import LoRA as LoRA
from jpeft.paths import TargetError as TargetError
from jpeft.rewrite import lift as lift
from jpeft.rewrite import merge as merge
from jpeft.summary import Summary as Summary
from jpeft.summary import summary as summary
from jpeft.transform import Chain as Chain
from jpeft.transform import Train as Train
from jpeft.transform import Transform as Transform
from jpeft.transform import chain as chain
from jpeft.uses import Use as Use
from jpeft.uses import uses as uses
