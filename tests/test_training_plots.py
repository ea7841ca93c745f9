"""The figure of a meta-training run: what its lines are, by hand."""

import numpy as np
import pytest

from evaluation.plots import svg
from evaluation.training_plots import meta_training


def panels(records, truncation=None):
    """Visible panels by title: {label of a line: (x, y)}."""
    figure = meta_training(records, truncation)
    assert svg(figure).startswith("<svg")
    return {
        panel.get_title(loc="left"): {line.get_label(): line.get_data() for line in panel.lines}
        for panel in figure.axes
        if panel.get_visible()
    }


def test_losses_by_window_are_pooled_by_tenths_of_the_run():
    rows = [{"step": i, "loss": 1.0, "loss_by_window": [float(i), None, 2.0]} for i in range(40)]
    rows[0]["loss_by_window"][1] = 5.0  # the only one
    lines = panels(rows, truncation=50)["Loss by inner step"]
    for stage, steps, losses in (
        ("first tenth", [50, 100, 150], [1.5, 5.0, 2.0]),  # rows 0 to 3
        ("middle tenth", [50, 150], [19.5, 2.0]),  # rows 18 to 21
        ("last tenth", [50, 150], [37.5, 2.0]),
    ):
        np.testing.assert_allclose(lines[stage], [steps, losses])


def test_each_diagnostic_has_a_panel_and_gaps_are_left_out():
    rows = [
        {"step": i, "loss": None if i == 3 else 1.0, "gradient_snr": 2.0 + i, "diverged": 0.0}
        for i in range(10)
    ]
    rows[4]["gradient_snr"] = None
    found = panels(rows)
    assert set(found) == {"Meta-loss", "Gradient: signal to noise", "Diverged inner runs"}
    steps, losses = found["Meta-loss"]["each outer step"]
    np.testing.assert_array_equal(steps, [0, 1, 2, 4, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(losses, np.ones(9))
    steps, average = found["Gradient: signal to noise"]["mean of the last 5"]
    assert (steps[-1], average[-1]) == (9, pytest.approx(np.mean([7, 8, 9, 10, 11])))
    assert average[0] == 2.0


def test_a_run_without_diagnostics_shows_its_loss():
    rows = [{"step": i, "loss": 1.0 / (1 + i)} for i in range(3)]
    assert set(panels(rows, truncation=5)) == {"Meta-loss"}
    assert set(panels([{"step": 0, "loss": None}])) == {"Meta-loss"}
