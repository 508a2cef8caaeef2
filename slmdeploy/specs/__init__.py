"""The nouns that users write or choose: Target, Profile, Workload, Budget, Recipe.

A target states facts about hardware and no intent; a profile says how to build and states no hardware fact; they meet
only in `build`. Knows nothing of graphs or torch.
"""

from slmdeploy.specs.base import Spec, load_toml, nearest
from slmdeploy.specs.budgets import (
    Budget,
    Change,
    Constraint,
    Objective,
    parse_budget,
    parse_change,
    parse_constraint,
)
from slmdeploy.specs.compilers import Compiler
from slmdeploy.specs.distillation import DistillStage, distill_stage
from slmdeploy.specs.encoder_recipes import EncoderRecipe
from slmdeploy.specs.encoders import EncoderStage, TextColumns, encoder_stage
from slmdeploy.specs.latency import LatencyLimit, parse_latency
from slmdeploy.specs.mixtures import Mixture, data_inputs, is_mixture, load_mixture
from slmdeploy.specs.profiles import (
    ActivationScale,
    Fp8,
    Gate,
    Profile,
    Requires,
    RoundingMethod,
    SessionOptions,
    Storage,
    Weights,
    list_profiles,
    load_profile,
)
from slmdeploy.specs.recipe_files import choose_workloads, load_recipe
from slmdeploy.specs.recipes import (
    BudgetSection,
    Candidates,
    DataSource,
    ModelSource,
    PackagePlan,
    Project,
    PrunePlan,
    Recipe,
)
from slmdeploy.specs.targets import Target, list_targets, load_target
from slmdeploy.specs.workloads import ENCODER_TASKS, Workload, named_workload

__all__ = [
    "ENCODER_TASKS",
    "ActivationScale",
    "Budget",
    "BudgetSection",
    "Candidates",
    "Change",
    "Compiler",
    "Constraint",
    "DataSource",
    "DistillStage",
    "EncoderRecipe",
    "EncoderStage",
    "Fp8",
    "Gate",
    "LatencyLimit",
    "Mixture",
    "ModelSource",
    "Objective",
    "PackagePlan",
    "Profile",
    "Project",
    "PrunePlan",
    "Recipe",
    "Requires",
    "RoundingMethod",
    "SessionOptions",
    "Spec",
    "Storage",
    "Target",
    "TextColumns",
    "Weights",
    "Workload",
    "choose_workloads",
    "data_inputs",
    "distill_stage",
    "encoder_stage",
    "is_mixture",
    "list_profiles",
    "list_targets",
    "load_mixture",
    "load_profile",
    "load_recipe",
    "load_target",
    "load_toml",
    "named_workload",
    "nearest",
    "parse_budget",
    "parse_change",
    "parse_constraint",
    "parse_latency",
]
