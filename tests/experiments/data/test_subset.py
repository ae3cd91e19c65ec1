"""Files of rows, and data of which only these are trained on."""

import numpy as np
import pytest

from crescendo.experiments.data.image_data import ImageData, ImageRows
from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.rows import Shuffled, Stream
from crescendo.experiments.data.shares import Shares
from crescendo.experiments.data.subset import Chosen, Subset, on_subset, read_subset, write_arrays, write_subset
from crescendo.experiments.runtime.errors import UserError


def data() -> ImageData:
    rows = ImageRows(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10))
    return ImageData("toy", rows, rows, rows, (2, 2, 1), 10, "aa")


def file(tmp_path, rows=(1, 4, 5, 9), **changes) -> str:
    path = tmp_path / "few.npz"
    write_subset(path, Chosen(np.array(rows), 10, "aa", "hand")._replace(**changes))
    return str(path)


def test_data_have_the_chosen_rows_and_all_else_of_their_own(tmp_path):
    whole, some = data(), on_subset(data(), file(tmp_path))
    assert on_subset(whole, None) is whole
    assert some.train.take([0, 3])["labels"].tolist() == [1, 9]
    assert (len(some.validation), some.classes) == (10, 10)
    assert str(some).endswith("; trained on 4 of 10 rows, by hand")
    assert some.fingerprint not in (whole.fingerprint, on_subset(data(), file(tmp_path, (1, 4, 5, 8))).fingerprint)
    assert some.fingerprint == on_subset(data(), file(tmp_path, by="others")).fingerprint


def test_the_order_is_one_of_the_seed_and_the_clock_over_the_chosen_rows(tmp_path):
    rows = on_subset(data(), file(tmp_path)).train
    labels = [Stream(rows, seed=7).read(seen, 1)["labels"][0] for seen in range(8)]
    assert sorted(labels[:4]) == sorted(labels[4:]) == [1, 4, 5, 9]
    assert labels == rows.numbers[Shuffled(4, 7)(range(8))].tolist()


def test_a_source_that_orders_all_its_rows_itself_is_refused():
    class Ordered(ImageRows):
        def order(self, seed: int) -> Shuffled:
            return Shuffled(len(self), seed)

    rows = Ordered(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3))
    with pytest.raises(UserError, match=r"train\.rows chooses rows of Ordered, which orders all of its rows itself"):
        Subset(rows, np.array([0])).order(0)


@pytest.mark.parametrize("changes", [{"data": "bb"}, {"of_rows": 11}])
def test_rows_of_other_data_are_refused_with_both(changes, tmp_path):
    some = on_subset(data(), file(tmp_path, **changes))
    with pytest.raises(UserError, match=r"1\d rows of other data \(fingerprint \w\w; these have 10 and aa\)"):
        _ = some.fingerprint


@pytest.mark.parametrize("rows", [(), (3, 3), (4, 1), (-1, 2), (10,)])
def test_numbers_that_can_t_be_are_refused(rows, tmp_path):
    path = tmp_path / "bad.npz"
    arrays = {"rows": np.array(rows, np.int64), "of_rows": np.int64(10), "data": "aa", "by": "hand"}
    write_arrays(path, arrays)
    with pytest.raises(UserError, match=r"bad\.npz: rows must be increasing numbers from 0 to 9, at least one"):
        read_subset(path)
    write_arrays(path, {**arrays, "rows": np.zeros(3)})
    with pytest.raises(UserError, match="rows is float64 of 1 axes"):
        read_subset(path)


def mixed() -> MixedRows:
    parts = {"many": data().train, "few": ImageRows(np.zeros((4, 2, 2, 1), np.uint8), np.arange(10, 14))}
    return MixedRows(parts, Shares([0], [[3072, 1024]], "hold"), {"few": 2})


def test_of_a_mixture_shares_stay_and_passes_are_over_what_is_chosen():
    rows = Subset(mixed(), np.array([0, 2, 4, 6, 8, 11, 13]))
    order = rows.order(seed=1)
    labels = rows.take(order(range(16)))["labels"]
    assert ((labels >= 10) == (Shares([0], [[3072, 1024]], "hold").drawn(range(16))[0] == 1)).all()
    assert set(labels.tolist()) == {0, 2, 4, 6, 8, 11, 13}
    assert order.epochs(16) == {"many": 12 / 5, "few": 4 / 2}
    order.check(16)
    with pytest.raises(UserError, match="draw 5 examples of few in 20, and its 2 rows give 4"):
        order.check(20)
    every, whole = np.arange(32), mixed().order(3)
    np.testing.assert_array_equal(Subset(mixed(), np.arange(14)).order(3)(every), whole(every))


def test_a_source_without_a_chosen_row_is_refused_by_name():
    with pytest.raises(UserError, match=r"train\.rows: no row of the source few is chosen: choose at least one"):
        Subset(mixed(), np.array([0, 9])).order(0)
