"""The picture of a training run."""

import pytest
from matplotlib.figure import Figure
from transformers import TrainerControl, TrainerState, TrainingArguments

from experiments.plot import TrainingPlot, draw_training

LOG = [
    {"eval_loss": 5.5, "eval_bits_per_byte": 8.0, "step": 0},
    {"loss": 3.0, "grad_norm": 1.0, "ponder_steps_mean": 2.5, "ponder_steps_std": 0.25, "step": 10},
    {"loss": 2.0, "grad_norm": 1.0, "ponder_steps_mean": 2.0, "ponder_steps_std": 0.5, "step": 20},
    {"eval_loss": 1.9, "eval_bits_per_byte": 2.7, "eval_read_entropy": 0.6, "step": 20},
    {"train_runtime": 3.0, "train_loss": 2.5, "step": 20},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, savefig = [], Figure.savefig

    def save(figure, *args, **kwargs):
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_panels_are_of_what_was_logged(tmp_path, figures):
    draw_training(LOG, tmp_path / "new" / "training.png")
    assert (tmp_path / "new" / "training.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = figures
    lines = {
        axis.get_title(loc="left"): {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for axis in figure.axes
    }
    assert lines == {
        "loss": {"eval_loss": [[0, 5.5], [20, 1.9]], "loss": [[10, 3], [20, 2]]},
        "bits per byte": {"eval_bits_per_byte": [[0, 8], [20, 2.7]]},
        "ponder steps": {"ponder_steps_mean": [[10, 2.5], [20, 2]]},
        "entropy": {"eval_read_entropy": [[20, 0.6]]},
    }
    (band,) = figure.axes[2].collections
    corners = band.get_paths()[0].vertices[:, 1]
    assert corners.min() == 1.5 and corners.max() == 2.75


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="log_history has .'epoch'.: expected"):
        draw_training([{"epoch": 1.0, "step": 3}], tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


def test_callback_draws_at_evaluations_and_at_the_end(tmp_path, figures):
    args = TrainingArguments(str(tmp_path), report_to="none")
    state, plot = TrainerState(log_history=LOG), TrainingPlot()
    plot.on_evaluate(args, state, TrainerControl())
    assert not figures, "there is no course before the first step"
    state.global_step = 20
    plot.on_evaluate(args, state, TrainerControl())
    plot.on_train_end(args, state, TrainerControl())
    assert len(figures) == 2
    state.is_world_process_zero = False
    plot.on_train_end(args, state, TrainerControl())
    assert len(figures) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"training.png"}
