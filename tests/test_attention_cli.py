"""`morph attention`: pictures of where networks look."""

import json

import pytest
from matplotlib import image

from morph.cli.main import main


def test_two_models_are_drawn_side_by_side(tmp_path, capsys):
    path = tmp_path / "maps.png"
    models = ["zoo:wrn-10-1", "zoo:darts-10-trained"]
    assert main(["attention", *models, "--images", "3", "--limit", "20", "--out", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "out": str(path), "images": 3}
    both = image.imread(path)
    alone = tmp_path / "alone.png"
    assert main(["attention", models[0], "--images", "3", "--limit", "20", "--out", str(alone)]) == 0
    assert image.imread(alone).shape[1] < both.shape[1]  # a column for each model
    fewer = tmp_path / "fewer.png"
    command = ["attention", models[0], "--tap", "relu", "--images", "1", "--limit", "20", "--out", str(fewer)]
    assert main(command) == 0
    assert image.imread(fewer).shape[0] < image.imread(alone).shape[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zoo:wrn-10-1", "--images", "0"], "give 1 or more"),
        (["zoo:wrn-10-1", "--tap", "grups.0"], "nearest: groups.0"),
        (["zoo:wrn-10-1", "torchvision:resnet18"], "draw them apart"),
        (["zoo:wrn-10-1", "--tap", "fc"], "no module or node 'fc'"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    path = tmp_path / "maps.png"
    assert main(["attention", *arguments, "--limit", "8", "--out", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not path.exists()


def test_a_picture_that_exists_is_kept(tmp_path, capsys):
    path = tmp_path / "maps.png"
    path.write_text("mine")
    assert main(["attention", "zoo:wrn-10-1", "--limit", "8", "--out", str(path)]) == 2
    assert path.read_text() == "mine"
