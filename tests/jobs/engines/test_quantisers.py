"""The controls by faiss: as many bits, read back near the vectors; what they can't do they say."""

import sys

import pytest
import torch

from jobs.engines.quantisers import quantised
from jobs.run import InputError
from models.behaviour.code_figures import error


def test_both_controls_tell_of_the_vectors_and_give_bytes_where_codes_are_bytes() -> None:
    emb_ND = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))  # 5 is no multiple of the books
    found = quantised(emb_ND, 2, 256)
    assert set(found) == {"pq", "rq"}
    for read_ND, code_NK in found.values():
        assert read_ND.shape == emb_ND.shape and error(emb_ND, read_ND) < 0.2
        assert code_NK is not None and code_NK.shape == (400, 2) and int(code_NK.max()) < 256
    assert all(code_NK is None for _, code_NK in quantised(emb_ND, 2, 16).values())


def test_what_has_no_control_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"entries 5 are no power of two"):
        quantised(torch.zeros(9, 2), 2, 5)
    with pytest.raises(InputError, match=r"9 items are fewer than 16 entries"):
        quantised(torch.zeros(9, 2), 2, 16)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="set controls to false"):
        quantised(torch.zeros(9, 2), 2, 4)
