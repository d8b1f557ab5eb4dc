"""Facts of fastai and torch that the package relies on."""

import pytest
from fastai.data.core import TfmdDL

from fastai_crl._fastai import inner_loader


def test_the_loader_of_one_process_holds_the_whole_one():
    distributed = pytest.importorskip("fastai.distributed")
    whole = TfmdDL(list(range(8)), bs=2, num_workers=0, device="cpu")
    assert inner_loader(distributed.DistributedDL(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(type("Own", (distributed.DistributedDL,), {})(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(whole) is whole
