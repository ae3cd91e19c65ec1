"""Classes of images: both networks, the meshes, and rows that weigh nothing."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.data.image_data import ImageRows
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context, padded_rows
from crescendo.experiments.tasks.images import images
from crescendo.experiments.tasks.language_model import language_model
from crescendo.models.norm_probes import norm_probes, with_probes
from crescendo.models.resnet import ResNetConfig
from crescendo.models.vit import ViTConfig

from .conftest import MESHES, assert_any_cut, assert_same_on, assert_same_through_stages, fresh, read

MODELS = {
    "resnet": ResNetConfig(width=4, blocks=1, group_width=2),
    "vit": ViTConfig(image_size=12, patch_size=3, width=16, layers=2, heads=4, mlp_width=32, dropout=0.2),
}


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)

    def rows(count):
        shape = (count, 10, 9, 3)
        return ImageRows(random.integers(0, 256, size=shape).astype(np.uint8), random.integers(0, 4, size=count))

    splits = {"train": rows(16), "validation": rows(6), "test": rows(5)}
    return SimpleNamespace(**splits, shape=(10, 9, 3), classes=4, fingerprint="pictures")


@pytest.fixture(params=MODELS)
def make(request, data):
    return lambda **options: images(data, MODELS[request.param].for_platform("cpu"), **options)


def test_they_say_what_they_are(make):
    task = make()
    assert (task.name, task.unit, task.units_per_example) == ("images", "image", 1)
    assert (task.config.classes, task.config.in_channels) == (4, 3)
    rows = task.train.take([3, 1])
    assert {name: (x.shape[1:], str(x.dtype)) for name, x in rows.items()} == {
        name: array[:2] for name, array in task.row.items()
    }
    assert {name: len(source) for name, source in task.held_out.items()} == {"validation": 6, "test": 5}
    assert task.fingerprint != make(label_smoothing=0.1).fingerprint
    assert task.flops_per_example > 0


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_refused_where_they_come_in(data, label):
    """Such as those of a test split that nobody tells the classes of."""
    wrong = ImageRows(data.test.images, np.array([0, 1, label, 2, 3]))
    task = images(SimpleNamespace(**{**vars(data), "test": wrong}), MODELS["resnet"].for_platform("cpu"))
    task.held_out["test"].take([0, 1])
    with pytest.raises(UserError, match=rf"labels of row 2 is {label}, and of classes = 4 it must lie in 0\.\.3"):
        task.held_out["test"].take([4, 2])


def test_networks_have_fingerprints_of_their_own(data):
    assert len({images(data, model.for_platform("cpu")).fingerprint for model in MODELS.values()}) == 2


def test_features_are_what_the_classes_are_told_by(make):
    """The last layer makes of them the cross-entropy that is evaluated."""
    task = make()
    parameters, rows = fresh(task), read(task.train, [0, 3, 5])
    features = task.features(parameters, rows, Context())
    logits = features @ parameters["head"]["kernel"]
    losses = -jax.nn.log_softmax(logits)[np.arange(3), rows["labels"]]
    total, weight = task.evaluate(parameters, rows, Context())["loss"]
    np.testing.assert_allclose([losses.sum(), 3], [total, weight], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("make", ["resnet", "vit"], indirect=True)
def test_any_mesh_will_do(make, mesh):
    task = make(label_smoothing=0.1)
    if isinstance(task.config, ResNetConfig) and {"tensor", "sequence"} & set(MESHES[mesh]):
        layout = parallel.Layout(parallel.make_mesh(**MESHES[mesh], devices=jax.devices()[:4]))
        with pytest.raises(
            ValueError, match=r"= 2: a residual network.*use (tensor|sequence) = 1 and more data or fsdp"
        ):
            task.place(layout)
        return
    assert_same_on(task, MESHES[mesh], read(task.train, range(4)))


@pytest.mark.slow
@pytest.mark.parametrize("make", ["vit"], indirect=True)
def test_stages_will_do_for_a_transformer(make, data):
    task = make(label_smoothing=0.1)
    assert_same_through_stages(task, read(task.train, range(4)))
    with pytest.raises(ValueError, match="mesh stage = 2: this task's loss is not in the parts that stages share"):
        images(data, MODELS["resnet"]).place(parallel.Layout(parallel.make_mesh(stage=2)))


@pytest.mark.slow
def test_any_cut_will_do(make):
    task = make()
    assert_any_cut(task, read(task.train, range(5)), seed=1)


@pytest.mark.slow
def test_padding_weighs_nothing(make):
    task = make()
    parameters = fresh(task)
    rows = read(task.held_out["test"], range(5))
    padded = padded_rows(task.held_out["test"], np.arange(5), 8) | {"example": np.arange(8, dtype=np.int32)}
    measured, found = (task.evaluate(parameters, x, Context(seed=3)) for x in (rows, padded))
    assert measured.keys() == {"loss", "accuracy"}
    assert {float(weight) for _, weight in measured.values()} == {5}
    # A product of another number of rows may add up in another order: some units in float32's last place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, measured)


@pytest.mark.parametrize("make", ["resnet", pytest.param("vit", marks=pytest.mark.slow)], indirect=True)
def test_label_smoothing_is_of_the_training_loss_alone(make):
    plain, smooth = make(), make(label_smoothing=0.2)
    parameters, rows = fresh(plain), read(plain.train, range(4))
    still = Context(training=False)
    np.testing.assert_array_equal(smooth.loss(parameters, rows, still).sum, plain.loss(parameters, rows, still).sum)
    assert smooth.evaluate(parameters, rows, Context()) == plain.evaluate(parameters, rows, Context())
    # With all labels equally likely the target is uniform: 0.8 of the loss and 0.2 of the mean over classes.
    every = [plain.loss(parameters, rows | {"labels": 0 * rows["labels"] + c}, Context()).sum for c in range(4)]
    expected = 0.8 * plain.loss(parameters, rows, Context()).sum + 0.2 * sum(every) / 4
    np.testing.assert_allclose(smooth.loss(parameters, rows, Context()).sum, expected, rtol=1e-5)


# A vision transformer's norms are those of the decoder, quick in `test_language_model.py`.
@pytest.mark.parametrize("make", ["resnet", pytest.param("vit", marks=pytest.mark.slow)], indirect=True)
def test_probed_parameters_will_do(make):
    task = make()
    parameters, rows = fresh(task), read(task.train, range(4))
    probed = with_probes(parameters, norm_probes(parameters, 4))
    loss = jax.jit(lambda p: task.loss(p, rows, Context()).sum)
    np.testing.assert_allclose(loss(probed), loss(parameters), rtol=1e-5)


def test_data_of_another_kind_are_refused(data, text, small_model):
    with pytest.raises(UserError, match="has no images with classes, which the task images is about"):
        images(text, MODELS["vit"].for_platform("cpu"))
    with pytest.raises(UserError, match="has no rows of tokens, which the task language_model is about"):
        language_model(data, small_model())


def test_options_out_of_their_range_are_refused(data):
    with pytest.raises(UserError, match=r"images.label_smoothing = 1 must be at least 0 and below 1"):
        images(data, MODELS["vit"].for_platform("cpu"), label_smoothing=1)
    small = ViTConfig(image_size=8).for_platform("cpu")
    with pytest.raises(UserError, match=r"vit.image_size = 8 is smaller than pictures of 10 x 9: use 12"):
        images(data, small)
