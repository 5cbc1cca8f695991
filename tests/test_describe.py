"""`--describe` against the published figures that need no data."""

import json
import subprocess
import sys

import pytest

from train.describe import describe, describe_text
from train.recipes import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("name", "parameters", "state", "container", "packed"),
    [
        ("baseline", 17_059_912, 67_191_072, None, None),
        ("sp1024_smear_bigram", 19_745_345, 77_408_516, 19_893_378, 15_174_786),
        # published: 16,384,256 with the 18,496 control numbers in float32; they are in float16 here
        ("sp2048_normuon", 19_941_440, 77_668_608, None, 16_384_256 - 2 * 18_496),
        ("sp4096_recurrence", 34_400_347, 132_358_508, 34_566_326, 26_636_470),
        ("sp8192_sdclip", 37_022_812, 137_605_488, 37_206_200, 29_276_344),
        ("sp8192_frontier", 35_945_673, 135_394_084, None, None),
        ("sp8192_ngram_tilt", 35_945_673, 135_394_084, None, None),
    ],
)
def test_parameters_and_bytes_are_the_published_ones(
    name: str, parameters: int, state: int, container: int | None, packed: int | None
) -> None:
    recipe = load_recipe(name)
    facts = describe(recipe.config(), recipe.published)
    assert facts["parameters"] == parameters
    assert facts["state_bytes"] == state
    assert container is None or facts["container_bytes"] == container
    assert packed is None or facts["packed_bytes"] == packed


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("baseline", 7_224_688_640),
        ("sp1024_smear_bigram", 4_900_257_792),
        ("sp2048_normuon", 5_836_374_016),
        ("sp4096_recurrence", 4_508_614_656),
        ("sp8192_sdclip", 3_903_848_448),
        ("sp8192_frontier", 3_844_079_616),
        ("sp8192_ngram_tilt", 3_932_946_432),
    ],
)
def test_published_steps_saw_the_published_tokens(name: str, tokens: int) -> None:
    recipe = load_recipe(name)
    assert recipe.published["steps"] * recipe.config().train_batch_tokens == tokens


def test_the_frontiers_counts_are_reached_by_settings_alone() -> None:
    settings: dict[str, object] = {"ve_dim": 0, "ve_layers": (), "skip_rows": 8, "num_loops": 2}
    counts = []
    for more in (
        {"parallel_form": "gptj"},  # #1493
        {"parallel_start_layer": 8, "parallel_form": "routed"},  # #1530
        {"head_gate": True},  # #1787
        {"smear_gate": "embedding"},  # #1855
        {"softcap_params": 2},  # #1945, #1953, #2014, #2135
    ):
        settings |= more
        counts.append(describe(load_recipe("sp8192_sdclip").config(**settings), {})["parameters"])
    assert counts == [35_944_536, 35_944_602, 35_945_658, 35_945_671, 35_945_673]


def test_smear_bigram_with_float16_embedding_has_the_other_published_size() -> None:
    facts = describe(load_recipe("sp1024_smear_bigram").config(tied_embed_bits=16), {})
    assert facts["container_bytes"] == 20_415_618
    assert facts["packed_bytes"] == 15_697_026
    stored = {tensor["name"]: tensor["stored"] for tensor in facts["tensors"]}
    assert (stored["embedding.weight"], stored["bigram.embedding"]) == ("float16", "int8")


@pytest.mark.parametrize(
    ("name", "before", "after", "order"),
    [
        ("baseline", 130.5, 130.5, list(range(9))),
        ("sp1024_smear_bigram", 167.1, 167.1, list(range(8))),
        ("sp2048_normuon", 220.2, 220.2, list(range(8))),
        ("sp4096_recurrence", 272.3, 295.9, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
        ("sp8192_sdclip", 284.9, 355.7, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_arithmetic_and_order_are_the_published_ones(name: str, before: float, after: float, order: list[int]) -> None:
    facts = describe(load_recipe(name).config(), {})
    assert facts["mflop_per_token"]["before_recurrence"] == pytest.approx(before, abs=0.05)
    assert facts["mflop_per_token"]["after_recurrence"] == pytest.approx(after, abs=0.05)
    assert facts["virtual_order"]["after_recurrence"] == order


@pytest.mark.parametrize(
    ("name", "matrices"),
    [("sp4096_recurrence", 66), ("sp8192_sdclip", 66), ("sp8192_frontier", 66), ("sp2048_normuon", 48)],
)
def test_as_many_matrices_as_published_are_int6(name: str, matrices: int) -> None:
    facts = describe(load_recipe(name).config(), {})
    assert sum(tensor["stored"] == "int6" for tensor in facts["tensors"]) == matrices


def test_the_schedule_of_sdclip_is_the_published_one() -> None:
    recipe = load_recipe("sp8192_sdclip")
    points = {
        round(point["seconds"] / 590, 6): point for point in describe(recipe.config(), recipe.published)["schedule"]
    }
    assert points[0.5]["lr_scale"] == pytest.approx(0.694444, abs=1e-6)
    assert points[0.25]["lr_scale"] == 1
    assert points[1.0]["lr_scale"] == 0
    assert points[1.0]["step"] == pytest.approx(recipe.published["steps"], abs=1)


def test_steps_are_not_told_where_no_step_time_is_known() -> None:
    quickstart = load_recipe("quickstart").config()
    facts = describe(quickstart, {})
    assert [point["step"] for point in facts["schedule"]][::6] == [
        0, quickstart.iterations // 2, quickstart.iterations,
    ]  # fmt: skip
    # its schedule follows the steps, so no second is known
    assert all(point["seconds"] is None for point in facts["schedule"])
    assert "  training ends after 1,400 steps or 1200 s, whichever comes first\n" in describe_text(facts)
    config = quickstart.replace(warmdown_by="clock")
    points = describe(config, {})["schedule"]
    assert all(point["step"] is None and point["muon_momentum"] is None for point in points)
    assert points[6]["lr_scale"] == pytest.approx(0.5 / 0.72)
    assert "no published step time" in describe_text(describe(config, {}))
    by_steps = describe(config.replace(warmdown_frac=0.0, warmdown_iters=300), {})["schedule"]
    assert all(point["lr_scale"] is None for point in by_steps)
    uncapped = describe(config.replace(max_wallclock_seconds=0.0, gptq_reserve_seconds=0.0), {})["schedule"]
    assert uncapped[-1]["step"] == config.iterations and uncapped[-1]["muon_momentum"] == pytest.approx(0.95)


@pytest.mark.parametrize("name", recipe_names())
def test_the_page_names_every_tensor(name: str) -> None:
    recipe = load_recipe(name)
    facts = describe(recipe.config(), recipe.published)
    text = describe_text(facts)
    assert f"{facts['parameters']:,} parameters" in text
    assert all(tensor["name"] in text for tensor in facts["tensors"])
    assert sum(tensor["parameters"] for tensor in facts["tensors"]) == facts["parameters"]


def test_the_command_prints_json() -> None:
    command = [sys.executable, "-m", "train", "--recipe", "sp8192_sdclip", "--num_layers", "11", "--describe", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout)["parameters"] == 37_022_812
    result = subprocess.run([*command[:-2], "--json"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "--describe" in result.stderr


@pytest.mark.parametrize(
    ("changes", "step_ms", "step", "begin"),
    [
        ({}, 118.86, 2000, "from step 2,000: encoder"),
        # 0.35 of 590 s
        ({"recur_start_frac": 0.35}, 100.0, 2065, "from step 2,065: encoder"),
        ({"recur_start_frac": 0.35}, None, None, "from 0.35 of training: encoder"),
        ({"recur_start_frac": 0.35, "warmdown_by": "steps", "iterations": 1001}, None, 351, "from step 351: encoder"),
    ],
)
def test_recurrence_is_described_from_its_step_or_fraction(
    changes: dict[str, object], step_ms: float | None, step: int | None, begin: str
) -> None:
    config = load_recipe("sp8192_sdclip").config(**changes)
    facts = describe(config, {"step_ms": step_ms} if step_ms else {})
    assert facts["virtual_order"]["recurrence_from_step"] == step
    assert facts["virtual_order"]["recurrence_from_fraction"] == changes.get("recur_start_frac", 0.0)
    assert begin in describe_text(facts)
