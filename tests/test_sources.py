"""Sources without network: generators against their formulas, pictures against their pixels."""

import numpy as np
import pytest

from tasks import glyphs, shapes, tables
from tasks.sources import OWN, SOURCES

GENERATED = [name for name, source in SOURCES.items() if source.licence == OWN]


@pytest.mark.parametrize("name", GENERATED)
def test_generators_are_deterministic_and_their_rows_valid(name):
    first, again = SOURCES[name].read(), SOURCES[name].read()
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert len(np.unique(first.inputs.reshape(len(first.inputs), -1), axis=0)) == len(first.inputs)
    assert first.inputs.dtype in (np.uint8, np.float32)
    assert np.isfinite(first.inputs).all()
    if first.classes:
        share = np.bincount(first.targets, minlength=first.classes) / len(first.targets)
        assert len(share) == first.classes
        assert share.min() > 0.4 / first.classes
    about, rows = SOURCES[name].about, first.inputs.shape
    assert f"{rows[0]:,} x {' x '.join(map(str, rows[1:]))}" in about
    assert f"{first.classes} classes" in about or (not first.classes and "real target" in about)


def test_alphabets_share_no_letter_and_their_letters_differ():
    """The mean image of a letter is nearest to that of the same letter in other rows."""
    for alphabet in (glyphs.GLYPHS, glyphs.RUNES):
        images, _ = glyphs.draw(alphabet)
        images = images.reshape(alphabet.letters, alphabet.rows, -1).astype(float)
        halves = images[:, ::2].mean(axis=1), images[:, 1::2].mean(axis=1)
        distances = np.square(halves[0][:, None] - halves[1][None]).sum(axis=-1)
        np.testing.assert_array_equal(distances.argmin(axis=1), np.arange(alphabet.letters))
        within, between = np.diag(distances).max(), distances[~np.eye(len(distances), dtype=bool)]
        assert within < 0.5 * between.min()
    assert glyphs.GLYPHS.seed != glyphs.RUNES.seed


def test_strokes_are_drawn_where_their_curve_is():
    """A horizontal line, and the parabola y = 1/2 - 2 (x - 1/2)^2 as a curve of second degree."""
    line = np.array([[[[0.25, 0.5], [0.5, 0.5], [0.75, 0.5]]]])
    image = glyphs.images_of(line, np.array([0.2]), 40, 1.0)[0]
    y, x = (np.indices((40, 40)) + 0.5) / 40
    inside = np.hypot(np.maximum(np.abs(x - 0.5) - 0.25, 0), y - 0.5) < 0.1
    assert np.mean((image > 0.5) != inside) < 0.01
    assert image.sum() / 1600 == pytest.approx(0.5 * 0.2 + np.pi * 0.1**2, rel=0.03)
    curve = np.array([[[[0.25, 0.375], [0.5, 0.625], [0.75, 0.375]]]])
    image = glyphs.images_of(curve, np.array([0.1]), 40, 1.0)[0]
    middle = (image * y).sum(axis=0) / np.maximum(image.sum(axis=0), 1e-9)
    columns = slice(13, 27)
    np.testing.assert_allclose(middle[columns], 0.5 - 2 * (x[0, columns] - 0.5) ** 2, atol=0.01)


@pytest.mark.parametrize(
    ("outline", "area", "inner"),
    [
        (shapes.disc, np.pi * 0.64, 0.8),
        (shapes.polygon(4), 2, np.sqrt(0.5)),
        (shapes.polygon(3), 3 * np.sqrt(3) / 4, 0.5),
        (shapes.cross(0.3), 4 * 0.6 - 0.36, 0.3 * np.sqrt(2)),
        (shapes.star(5, 0.45), 5 * 0.45 * np.sin(np.pi / 5), 0.45),
        (shapes.flower(3), np.pi * (0.49 + 0.045), 0.4),
    ],
    ids=["disc", "square", "triangle", "cross", "star", "flower"],
)
def test_outlines_enclose_the_area_of_their_shape(outline, area, inner):
    angle = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    radius = outline(angle)
    assert np.mean(radius**2) * np.pi == pytest.approx(area, rel=1e-3)
    assert radius.min() == pytest.approx(inner, rel=1e-3)
    assert radius.max() <= np.hypot(1, 0.3) + 1e-6


@pytest.mark.parametrize("name", ["china", "flower"])
def test_patches_cover_a_photograph_once(name):
    from sklearn.datasets import load_sample_image

    image, (patches, targets, classes) = load_sample_image(f"{name}.jpg"), SOURCES[name].read()
    assert patches.shape == (53 * 80, 8, 8, 3)
    for number in (0, 79, 80, 2000, 4239):
        row, column = divmod(number, 80)
        place = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
        np.testing.assert_array_equal(patches[number], image[place])
        assert targets[number] == 3 * (3 * row // 53) + 3 * column // 80
    assert np.bincount(targets, minlength=classes).min() > 0.9 * len(targets) / 9
    assert patches.astype(int).sum() == image[:424].astype(int).sum()  # every pixel once


def test_friedman_is_that_of_sklearn():
    from sklearn.datasets import make_friedman1

    inputs, expected = make_friedman1(n_samples=200, random_state=0)
    np.testing.assert_allclose(tables.friedman_mean(inputs), expected, rtol=1e-12)
    rows = SOURCES["friedman"].read()
    noise = rows.targets - tables.friedman_mean(rows.inputs.astype(float))
    assert abs(noise.mean()) < 4 / np.sqrt(3000)
    assert noise.std() == pytest.approx(1, abs=4 / np.sqrt(6000))


def test_waves_are_mixed_as_breiman_says():
    """Means and variances of every feature of every class, from E u = 1/2 and var u = 1/12."""
    h1 = np.array([max(6 - abs(i - 11), 0) for i in range(1, 22)], float)
    h2 = np.array([max(6 - abs(i - 4 - 11), 0) for i in range(1, 22)], float)
    h3 = np.array([max(6 - abs(i + 4 - 11), 0) for i in range(1, 22)], float)
    rows = SOURCES["waveform"].read()
    for label, (a, b) in enumerate([(h1, h2), (h1, h3), (h2, h3)]):
        of_class = rows.inputs[rows.targets == label]
        variance = 1 + (a - b) ** 2 / 12
        error = 4.5 / np.sqrt(len(of_class))
        np.testing.assert_array_less(abs(of_class.mean(0) - (a + b) / 2), error * variance**0.5)
        np.testing.assert_array_less(abs(of_class.var(0) - variance), error * 2 * variance)


def test_arms_of_spirals_are_near_but_no_line_parts_them():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    x, y, _ = SOURCES["spirals"].read()
    models = KNeighborsClassifier(15), LogisticRegression()
    near, line = (model.fit(x[::2], y[::2]).score(x[1::2], y[1::2]) for model in models)
    assert near > 0.9
    assert line < 0.55


def test_the_teacher_sees_unequal_directions_and_is_not_linear():
    from sklearn.linear_model import LogisticRegression

    x, y, _ = SOURCES["teacher"].read()
    deviations = np.sqrt(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    np.testing.assert_allclose(deviations, np.geomspace(1, 0.05, 24), rtol=0.15)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    line = LogisticRegression().fit(x[::2], y[::2]).score(x[1::2], y[1::2])
    assert 0.5 < line < 0.7
