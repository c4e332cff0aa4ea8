"""evaluation/kept.py: eval.py --from makes the same files without a map, of one run or several."""

import shutil

import pytest
from conftest import contents, eval_arguments, failure
from test_eval_methods import METHODS, arguments, write_methods

import eval as script


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The data and maps of METHODS, their results in `all`, and those of each in the folder of its name."""
    folder = write_methods(tmp_path_factory.mktemp("kept"))
    scored(folder, METHODS, "all")
    for method in METHODS:
        scored(folder, [method], method)
    return folder


def scored(root, methods, results, *more):
    script.main(arguments(root, methods, "--save_path", root / results, *more))


def again(folder, *options):
    script.main(eval_arguments("--save_path", folder, "--from", *options))
    return written(folder)


def written(folder):
    return {path.name: content for path, content in contents(folder).items()}


def test_the_files_are_those_of_the_scoring_run_byte_for_byte(root, tmp_path):
    assert again(tmp_path, root / "all") == written(root / "all")


def test_runs_are_merged_as_if_they_had_been_one(root, tmp_path):
    assert again(tmp_path, *(root / method for method in METHODS)) == written(root / "all")


@pytest.mark.usefixtures("without_figures")
def test_methods_are_chosen_ordered_and_renamed_and_metrics_chosen_anew(root, tmp_path):
    options = ["--metrics", "maxEm", "Smeasure", "--examples", "fish_000"]
    written_anew = again(tmp_path / "a", root / "all", "--methods", "Ours=shift", "blur", *options)
    (root / "maps/Ours").symlink_to(root / "maps/shift")
    scored(root, ["Ours", "blur"], "other", *options)
    expected = written(root / "other")
    names = [name for name in expected if name.startswith(("results.csv", "per_image", "groups", "comp", "examples"))]
    assert len(names) == 6 and all(expected[name] == written_anew[name] for name in names)


@pytest.mark.usefixtures("without_figures")
def test_sets_are_chosen_as_in_a_run_that_scores_them(root, tmp_path):
    written_anew = again(tmp_path, root / "all", "--sets", "HARD")
    scored(root, METHODS, "hard", "--sets", "hard")
    assert written_anew == written(root / "hard")


@pytest.mark.usefixtures("without_figures")
def test_what_needs_lost_maps_is_left_out_and_named(root, tmp_path, capsys):
    again(tmp_path / "a", root / "all", "--metrics", "MAE")
    shutil.move(root / "maps", tmp_path)
    try:
        files = again(tmp_path / "a", root / "all", "--metrics", "MAE", "--examples", "easy/fish_000")
    finally:
        shutil.move(tmp_path / "maps", root)
    line = "not shown, since their image, ground truth or maps are gone: easy/fish_000, "
    assert line in capsys.readouterr().out and b"are gone" in files["results.tex"]
    assert b'<div class="card">' not in files["report.html"] and b"MAE" in files["results.md"]


@pytest.mark.parametrize("options", [["--methods", "blur"], ["--sets", "easy"]])
def test_scores_are_not_replaced_by_some_of_them(options, root, capsys):
    before, folder = written(root / "all"), root / "all"
    args = eval_arguments("--save_path", folder, "--from", f"{folder}/../all", *options)
    status, line = failure(script.main, args, capsys)
    assert status == 2 and f"{folder}/scores.npz: is one of the inputs and would be replaced" in line
    assert written(folder) == before


def test_files_of_an_earlier_run_with_more_methods_are_removed(root, tmp_path):
    more = again(tmp_path, root / "all").keys()
    assert more - again(tmp_path, root / "blur").keys() == {"comparison.csv", "examples.png", "examples.pdf"}


def test_results_that_do_not_fit_are_refused(root, tmp_path, capsys):
    scored(root, ["noise"], "fewer", "--sets", "easy")
    shutil.copytree(root / "blur", tmp_path / "damaged")
    (tmp_path / "damaged/scores.npz").write_bytes((root / "blur/scores.npz").read_bytes()[:-100])
    shutil.copytree(root / "blur", tmp_path / "flipped")
    content = bytearray((root / "blur/scores.npz").read_bytes())
    content[100] ^= 0xFF
    (tmp_path / "flipped/scores.npz").write_bytes(content)
    for options, message in (
        ([root / "blur", root / "fewer"], "fewer has not scored the same images as those before it: hard/crab_001"),
        ([root / "blur", root / "blur"], "of several, rename or choose them first, in a folder of their own"),
        ([f"ours={root}/all"], "has several methods: blur, noise, shift; rename or choose them first"),
        ([root / "all", "--metrics", "HCE"], "not scored with HCE; score the maps again with --metrics"),
        ([root / "all", root / "blur"], "two methods are called blur; name a folder of one method, as in ours="),
        ([root / "all", "--methods", "none"], "none is not among blur, noise, shift"),
        ([root / "all", "--methods", "a=blur", "a=noise"], "may occur only once"),
        ([root / "all", "--sets", "x"], "--sets: x is not among easy, hard"),
        ([root / "maps"], "has no scores.npz"),
        ([tmp_path / "damaged"], "is damaged or of another version"),
        ([tmp_path / "flipped"], "is damaged or of another version"),
        ([root / "all", "--pred_path", root], "reads no map: leave out --pred_path"),
    ):
        status, line = failure(script.main, eval_arguments("--save_path", tmp_path, "--from", *options), capsys)
        assert status == 2 and message in line
