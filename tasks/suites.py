"""Named sets of families. What is held out shares neither data nor architecture with what is
trained on, nor with the suites by which meta-trained optimizers are selected (metaval).

By data: `train/*` has digits, glyphs, china, shapes, teacher, wine, iris, friedman and python_docs;
`metaval/*` petals, spirals, diabetes and sklearn_docs; `heldout/*` runes, flower, waveform,
breast_cancer, python_code and numpy_docs. The quick suites, of the quickstart, share digits, in
halves that share no row. The convex suites draw their problems, which are of other keys in
training and evaluation, but for breast_cancer and flower.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from tasks.autoencoder import Autoencoder
from tasks.base import TaskFamily
from tasks.bfloat16 import Bfloat16
from tasks.conv_net import ConvNet
from tasks.convex import (
    BoxQuadratic,
    ElasticNetRegression,
    Lasso,
    LogisticL1,
    NonNegativeRegression,
    PatchLasso,
    TabularLogistic,
)
from tasks.data import Dataset, unknown_name
from tasks.dynamic import Dynamic
from tasks.es_loss import ESLoss
from tasks.gradient_augment import (
    DelayedGradients,
    GradientNoise,
    NormalizedGradients,
    RandomDirections,
    ScaledGradients,
)
from tasks.haiku_mlp import HaikuMLP
from tasks.image_mlp import ImageMLP
from tasks.landscapes import Landscape
from tasks.matrix_factorization import MatrixFactorization
from tasks.mlp import MLP
from tasks.patches import Patches
from tasks.quadratic import Quadratic
from tasks.reduced_batch import ReducedBatch
from tasks.reparam import Reparam
from tasks.resnet import Resnet
from tasks.rnn_lm import RnnLM
from tasks.sources import SOURCES
from tasks.tabular import TabularMLP
from tasks.text import TEXTS, Text
from tasks.tiny_optimizer import TinyOptimizer
from tasks.transformer_lm import TransformerLM
from tasks.vae import VAE
from tasks.vit import Vit

Suite = dict[str, TaskFamily]


def _train_quick() -> Suite:
    dynamic = Dynamic(init_scale=(0.3, 3.0))
    return {"digits_mlp": ImageMLP(data="digits/meta_train", hidden=(32,), dynamic=dynamic)}


def _heldout_quick() -> Suite:
    return {
        "digits_conv": ConvNet(data="digits/held_out", channels=(8, 16)),
        "digits_mlp": HaikuMLP(data="digits/held_out", hidden=(48, 24), activation="tanh"),
        "breast_cancer_mlp": HaikuMLP(data="breast_cancer", hidden=(16, 16), activation="relu"),
    }


def _train_fast() -> Suite:
    """Celo's four tasks (arXiv:2501.12670) on other data: MLPs of one layer on 8x8 images, in
    globally rescaled coordinates.
    """
    images = {"digits": "digits", "glyphs": "glyphs@8x8", "china": "china", "shapes": "shapes@8x8"}
    return {
        f"{name}_mlp": Reparam(ImageMLP(data=data, hidden=(32,), dynamic=Dynamic()))
        for name, data in images.items()
    }


def _train_diverse() -> Suite:
    """Families and augmentations of VeLO's distribution (arXiv:2211.09760), small."""
    varied = Dynamic(
        activation=("relu", "tanh", "gelu"),
        init_scale=(0.5, 2.0),
        subset=(0.1, 1.0),
        label_noise=(0.0, 0.2),
    )
    plain = Dynamic(activation=("relu", "tanh", "gelu"), init_scale=(0.5, 2.0))
    scaled = Dynamic(init_scale=(0.5, 2.0))
    return {
        "digits_mlp": Reparam(ImageMLP("digits", hidden=(32,), dynamic=varied), "tensor"),
        "glyphs_mlp": ReducedBatch(ImageMLP("glyphs", hidden=(24, 24), dynamic=varied)),
        "china_conv": Reparam(ConvNet("china", channels=(8, 16), batch_size=32, dynamic=varied)),
        "glyphs_autoencoder": GradientNoise(Autoencoder("glyphs@8x8", (24, 6, 24), dynamic=plain)),
        "digits_vae": Reparam(VAE("digits", hidden=(24,), latent=4, dynamic=plain), "parameter"),
        "teacher_mlp": Bfloat16(TabularMLP("teacher", hidden=(24,), dynamic=varied)),
        "wine_mlp": NormalizedGradients(TabularMLP("wine", hidden=(16, 16), dynamic=varied)),
        "friedman_mlp": DelayedGradients(TabularMLP("friedman", hidden=(24,), dynamic=plain)),
        "iris_mlp": RandomDirections(
            TabularMLP("iris", hidden=(8,), dynamic=scaled), directions=(1, 64)
        ),
        "docs_gru": Reparam(
            RnnLM("python_docs", "gru", embed=8, hidden=16, length=12, batch_size=8), "tensor"
        ),
        "docs_transformer": Reparam(
            TransformerLM("python_docs", width=16, depth=1, length=12, batch_size=8), "global"
        ),
        "quadratic": Quadratic(dimension=20, condition=(10.0, 1e4), noise=0.01),
        "rosenbrock": ESLoss(Landscape("rosenbrock", dimension=6)),
        "rastrigin": Landscape("rastrigin", dimension=4, noise=0.1),
        "factorization": Reparam(MatrixFactorization(rows=16, columns=12, rank=3)),
        "tiny_optimizer": TinyOptimizer(),
    }


WIDTHS = (64, 128, 256)


def _train_widths(base_width: int | None) -> Suite:
    """MLPs of three widths, as those that arXiv:2406.00153 meta-trains on."""
    return {f"glyphs_mlp_{w}": MLP("glyphs@8x8", w, base_width=base_width) for w in WIDTHS}


def _train_proxies() -> Suite:
    """For the search of programs: some 800 params each, and gradients of all sizes, noisy and
    ill-conditioned, as an easy task tells optimizers apart by their learning rate only.
    """
    noisy = {"label_noise": (0.1, 0.1)}
    relu, tanh = Dynamic(("relu",), **noisy), Dynamic(("tanh",), **noisy)
    small = TabularMLP("teacher", hidden=(16, 16), batch_size=32, dynamic=tanh)
    return {
        "teacher_mlp": TabularMLP("teacher", hidden=(24,), dynamic=relu),
        "teacher_mlp_small_gradients": ScaledGradients(small, (0.02, 0.02)),
        "digits_mlp_large_gradients": ScaledGradients(
            ImageMLP("digits", hidden=(12,), batch_size=32, dynamic=relu), (50.0, 50.0)
        ),
        "friedman_mlp_noisy_gradients": GradientNoise(
            TabularMLP("friedman", hidden=(24,), dynamic=Dynamic(("relu",))), (1.0, 1.0)
        ),
    }


def _metaval_small() -> Suite:
    return {
        "petals_mlp": ImageMLP("petals@8x8", hidden=(48, 32), dynamic=Dynamic()),
        "petals_conv": ConvNet("petals", channels=(6, 12, 24), batch_size=32),
        "spirals_mlp": TabularMLP("spirals", hidden=(32, 16), dynamic=Dynamic(("tanh",))),
        "diabetes_mlp": TabularMLP("diabetes", hidden=(12, 12), dynamic=Dynamic(("relu",))),
        "petals_autoencoder": Autoencoder("petals@8x8", (40, 10, 40)),
        "sklearn_docs_gru": RnnLM("sklearn_docs", "gru", embed=8, hidden=24, length=16),
        "ackley": Landscape("ackley", dimension=5, noise=0.05),
    }


def _heldout_small() -> Suite:
    return {
        "runes_mlp": ImageMLP("runes@8x8", hidden=(40, 40, 40), dynamic=Dynamic(("gelu",))),
        "flower_mlp": ImageMLP("flower", hidden=(64,), batch_size=32, dynamic=Dynamic()),
        "runes_conv": ConvNet("runes@8x8", channels=(12, 12, 24), batch_size=32),
        "flower_resnet": Resnet("flower", width=6, blocks=(1, 1), batch_size=16),
        "runes_vit": Vit("runes@8x8", patch=4, width=12, depth=2, heads=2, batch_size=32),
        "flower_autoencoder": Autoencoder("flower", (48, 12, 48), batch_size=32),
        "runes_vae": VAE("runes@8x8", hidden=(48,), latent=6),
        "breast_cancer_logistic": TabularMLP("breast_cancer", hidden=(), dynamic=Dynamic()),
        "waveform_mlp": TabularMLP("waveform", hidden=(20, 20, 20), dynamic=Dynamic(("silu",))),
        "code_lstm": RnnLM("python_code", "lstm", embed=8, hidden=20, length=12, batch_size=8),
        "code_transformer": TransformerLM(
            "python_code", width=12, depth=2, heads=2, length=12, batch_size=8
        ),
        "power_law_quadratic": Quadratic(
            dimension=32, condition=(1e3, 1e3), noise=0.01, spectrum="power_law"
        ),
        "levy": Landscape("levy", dimension=8, noise=0.05),
        "completion": MatrixFactorization(rows=24, columns=20, rank=2),
    }


def _heldout_proxies() -> Suite:
    """For programs that were found on train/proxies: other families, initial params and sizes of
    gradients.
    """
    waveform = TabularMLP("waveform", hidden=(20, 20), dynamic=Dynamic(("silu",), (2.0, 2.0)))
    return {
        "waveform_mlp_small_gradients": ScaledGradients(waveform, (0.003, 0.003)),
        "runes_conv_large_gradients": ScaledGradients(
            ConvNet("runes@8x8", channels=(8, 12), batch_size=32), (300.0, 300.0)
        ),
        "flower_autoencoder": Autoencoder("flower", (24, 8, 24), batch_size=32),
        "code_gru": RnnLM("python_code", "gru", embed=8, hidden=18, length=12, batch_size=8),
    }


def _heldout_wide() -> Suite:
    return {
        "runes_mlp_512": ImageMLP("runes", hidden=(512, 512), dynamic=Dynamic()),
        "flower_conv_64": ConvNet("flower", channels=(32, 64), dynamic=Dynamic()),
        "flower_resnet_32": Resnet("flower", width=32, blocks=(1, 1, 1), batch_size=32),
        "runes_vit_96": Vit("runes", patch=4, width=96, depth=3, heads=4, batch_size=32),
        "flower_autoencoder_256": Autoencoder("flower", (256, 64, 256)),
        "waveform_mlp_256": TabularMLP("waveform", hidden=(256,) * 4, dynamic=Dynamic()),
        "code_lstm_128": RnnLM("python_code", "lstm", embed=32, hidden=128, length=32),
        "code_transformer_96": TransformerLM(
            "python_code", width=96, depth=3, heads=4, length=32, batch_size=16
        ),
    }


def _train_convex() -> Suite:
    """Convex problems F = f + r of other penalties, conditioning and units than a plain LASSO's."""
    drawn = {"density": (0.03, 0.3), "coherence": (0.0, 0.9)}
    return {
        "lasso": Lasso(40, 80, noise=(0.0, 0.3), rho=(0.02, 0.5), **drawn),
        "elastic_net": ElasticNetRegression(
            30, 60, noise=(0.0, 0.3), rho=(0.02, 0.5), ridge=(0.01, 1.0), **drawn
        ),
        # without noise the least F may be 0
        "nnls": NonNegativeRegression(60, 30, noise=(0.05, 0.5), **drawn),
        "logistic": LogisticL1(100, 30, density=(0.1, 0.6), noise=(0.0, 0.2), rho=(0.003, 0.1)),
        "box_quadratic": BoxQuadratic(30, condition=(3.0, 1e3), scale=(0.3, 3.0)),
    }


def _heldout_lasso() -> Suite:
    """train/lasso, and what is unlike it in one respect, of which it has the name."""
    return {
        "lasso": Lasso(),
        "signal_10": Lasso(scale=10.0),
        "signal_0.1": Lasso(scale=0.1),
        "density_0.3": Lasso(density=0.3),
        "density_0.02": Lasso(density=0.02),
        "noise_0.5": Lasso(noise=0.5),
        "coherence_0.5": Lasso(coherence=0.5),
        "coherence_0.9": Lasso(coherence=0.9),
        "rho_0.01": Lasso(rho=0.01),
        "rho_0.5": Lasso(rho=0.5),
        # the same problems in other units: rho has those of the matrix squared
        "matrix_scale_0.01": Lasso(matrix_scale=1e-2, rho=1e-5),
        "matrix_scale_100": Lasso(matrix_scale=1e2, rho=1e3),
        "size_25x50": Lasso(25, 50),
        "size_100x200": Lasso(100, 200),
        "size_250x500": Lasso(250, 500),
        "patches": PatchLasso("flower"),
    }


def _heldout_convex() -> Suite:
    return {
        "elastic_net": ElasticNetRegression(),
        "nnls": NonNegativeRegression(),
        "box_quadratic": BoxQuadratic(),
        "logistic": LogisticL1(rho=0.02),
        "breast_cancer_logistic": TabularLogistic("breast_cancer"),
    }


# Functions, so that listing the names loads no data.
SUITES: dict[str, Callable[[], Suite]] = {
    "train/quick": _train_quick,
    "train/fast": _train_fast,
    "train/diverse": _train_diverse,
    "train/proxies": _train_proxies,
    "train/widths": functools.partial(_train_widths, None),
    "train/mup_widths": functools.partial(_train_widths, 128),
    "train/lasso": lambda: {"lasso": Lasso()},
    "train/convex": _train_convex,
    "metaval/small": _metaval_small,
    "heldout/quick": _heldout_quick,
    "heldout/small": _heldout_small,
    "heldout/proxies": _heldout_proxies,
    "heldout/wide": _heldout_wide,
    "heldout/lasso": _heldout_lasso,
    "heldout/convex": _heldout_convex,
}


def suite(name: str) -> Suite:
    """Families by name, e.g. `suite("heldout/quick")["digits_conv"]`.

    Raises:
      ValueError: no such suite; the message lists those that exist.
    """
    if name not in SUITES:
        raise ValueError(unknown_name("suite", name, SUITES))
    return SUITES[name]()


def datasets(family: Any) -> list[Dataset | Text | Patches]:
    """What a family, or any dataclass, holds of them."""
    if isinstance(family, Dataset | Text | Patches):
        return [family]
    if not dataclasses.is_dataclass(family):
        return []
    fields = [getattr(family, field.name) for field in dataclasses.fields(family)]
    return [data for field in fields for data in datasets(field)]


def provenance(family: Any) -> list[tuple[str, str, str]]:
    """The source, what it is, and its licence, of all data of a family."""
    known = {**SOURCES, **TEXTS}
    found = []
    for data in datasets(family):
        name = data.name.removeprefix("stream:")
        source = name if ":" in name else re.split("[@/]", name)[0]
        about = (known[source].about, known[source].licence) if source in known else ("", "")
        found.append((source, *(text or "see TensorFlow Datasets" for text in about)))
    return found
