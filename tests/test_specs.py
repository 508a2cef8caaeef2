"""The strict loader: what is valid loads, and every wrong thing is one sentence with file, key and remedy."""

from pathlib import Path

import pytest

from slmdeploy import specs
from slmdeploy.errors import InputError, SpecError

RECIPE = """
name = "small"
tasks = ["generate"]
[model]
teacher = "teacher"
[data]
source = "stdlib"
[candidates]
profiles = ["cpu-fp32"]
[[workload]]
name = "short"
task = "generate"
prompt_tokens = 8
new_tokens = 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_small_recipe_loads_with_the_defaults(tmp_path: Path) -> None:
    recipe = specs.load_recipe(write(tmp_path, RECIPE + '[budget]\nconstraints = ["tpot_ms_p50 <= 3"]\n'))
    assert recipe.prune is None
    assert recipe.distill == ()
    assert recipe.parsed_budget().constraints[0] == specs.parse_constraint("tpot_ms_p50<=3")
    assert recipe.budget.objective == "fastest"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RECIPE + "requestss = 3\n", "unknown key 'workload.0.requestss': did you mean 'requests'?"),
        (RECIPE + "items = 3\n", "workload.0: task = 'generate' does not take items"),
        (RECIPE + '[prune]\nratio = "half"\n', "prune.ratio = 'half': input should be a valid number"),
        (RECIPE + "[prune]\nratio = 2.0\n", "prune.ratio = 2.0: input should be less than 1"),
        (RECIPE + "[prune]\nratioo = 0.5\n", "unknown key 'prune.ratioo': did you mean 'ratio'?"),
        (RECIPE + "[prune]\nratio = 0.0\n", "prune: ratio = 0 goes with a layer_ratio or hidden_ratio above 0"),
        (RECIPE + "[prune]\nratio = 0.5\nlayer_ratio = 1.0\n", "prune.layer_ratio = 1.0: input should be less than 1"),
        (RECIPE + "[prune]\nratio = 0.5\nlayer_ratio = -0.1\n", "prune.layer_ratio = -0.1: input should be greater"),
        (
            RECIPE + "[prune]\nratio = 0.5\nrounds = 2\n",
            "prune: rounds above 1 and a [prune.between] stage go together",
        ),
        (RECIPE + "[prune]\n", "prune: give a ratio, or a latency to shape the model to"),
        (RECIPE + '[prune]\nlatency = "ttft_512_ms<=20"\n', "prune: latency and profile go together"),
        (
            RECIPE + '[prune]\nlatency = "ttft_512_ms<=20"\nprofile = "cpu-int8"\nratio = 0.5\n',
            "prune: latency decides what goes",
        ),
        (
            RECIPE + '[prune]\nlatency = "ttft<=20"\nprofile = "cpu-int8"\n',
            "prune: latency 'ttft<=20' is not of the form",
        ),
        (
            RECIPE + '[prune]\nratio = 0.5\nrounds = 2\nallocation = "global"\n[prune.between]\nsteps = 1\n',
            "prune: rounds above 1 go with allocation uniform",
        ),
        (RECIPE + "[[distill]]\nstep = 5\n", "unknown key 'distill.0.step': did you mean 'steps'?"),
        (RECIPE + '[budget]\nconstraints = ["fast"]\n', "budget 'fast' is not of the form metric<=number"),
        (RECIPE.replace('name = "small"\n', ""), "the key 'name' is missing"),
        (RECIPE.replace("prompt_tokens = 8", "prompt_tokens = true"), "workload.0.prompt_tokens = True"),
        ("name = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        specs.load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_layers_alone_may_be_pruned(tmp_path: Path) -> None:
    plan = specs.load_recipe(write(tmp_path, RECIPE + "[prune]\nratio = 0\nlayer_ratio = 0.25\n")).prune
    assert plan
    assert (plan.ratio, plan.layer_ratio) == (0, 0.25)
    assert specs.PrunePlan(ratio=0.5).layer_ratio == 0


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"there is no profile 'cpu-int9': did you mean 'cpu-int[48]'\?"):
        specs.load_profile("cpu-int9")
    with pytest.raises(SpecError, match="there is no target"):
        specs.load_target("toaster")


def test_a_path_is_a_file_and_a_name_is_shipped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        specs.load_profile(str(tmp_path / "mine.toml"))
    assert specs.load_profile("cpu-fp32").weights.scheme == "fp32"


def test_every_shipped_file_is_valid_and_carries_its_own_name() -> None:
    profiles, targets = specs.list_profiles(), specs.list_targets()
    assert {"cpu-fp32", "cpu-int8", "cpu-int8-weight", "cpu-int4"} <= {p.name for p in profiles}
    assert len(targets) >= 6
    assert all(specs.load_profile(p.name) == p for p in profiles)
    assert all(specs.load_target(t.name) == t for t in targets)


def test_a_figure_without_a_source_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 'name="x"\nsummary="x"\nkind="cpu"\nengines=["onnxruntime"]\nmemory_bytes=1\n')
    with pytest.raises(SpecError, match=r"sources\.memory_bytes is missing"):
        specs.load_target(str(path))


def test_bits_must_fit_the_scheme(tmp_path: Path) -> None:
    path = write(tmp_path, 'name="x"\nsummary="x"\nengine="onnxruntime"\n[weights]\nscheme="w8a8"\nbits=4\n')
    with pytest.raises(SpecError, match="bits = 4 does not go with scheme = 'w8a8'"):
        specs.load_profile(str(path))


@pytest.mark.parametrize("text", ["", "a<3", "a<=b", "a<=1.2.3", "A<=1", "a<=nan", "a=<1"])
def test_a_constraint_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form"):
        specs.parse_constraint(text)


def test_a_constraint_holds_at_its_limit() -> None:
    assert specs.parse_constraint("auc >= 0.9").holds(0.9)
    assert not specs.parse_constraint("auc>=0.9").holds(0.89)
    assert specs.parse_constraint("size_bytes<=2e7").limit == 2e7


def test_workloads_by_name_or_by_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, RECIPE)
    assert [w.name for w in specs.choose_workloads([], recipe)] == ["short"]
    assert specs.choose_workloads(["generate-32-32"])[0].new_tokens == 32
    with pytest.raises(InputError, match="write one like generate-128-64"):
        specs.choose_workloads(["generate-32"])
    with pytest.raises(InputError, match="one of the two"):
        specs.choose_workloads([])
