"""Encoders of other kinds: attention both ways inside an item (DARec), learned suffix tokens over a frozen base (Laser)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from models.text import fp8
from models.text.embedding import check_packing, embed, embed_items
from models.text.encoder import SPEC, SUFFIX, Encoder, load_encoder, of_base, read_spec, save_encoder
from models.text.lora import Lora
from models.text.objectives import Signals
from models.text.prompts import prompts, take
from models.text.scft import Interrupted, Scft, Tuned, fine_tune
from models.text.users import users_of
from tests.models import tiny
from tests.models.text.test_scft import SMALL
from tests.models.text.test_scft import base as base  # for pytest, which looks fixtures up here
from tests.models.text.test_scft import own_cache as own_cache

STRONG = dataclasses.replace(SMALL, learning_rate=0.05)


def plain_both(encoder: Encoder, row: list[int]) -> torch.Tensor:
    """hidden_TE of one prompt by transformers' own attention: the head sees the head, the item both, both ways."""
    model = AutoModel.from_pretrained(encoder.spec.base, attn_implementation="eager", dtype=torch.float32).eval()
    head, whole = len(encoder.head), len(encoder.head) + len(row)
    mask = torch.zeros(1, 1, whole, whole)
    mask[..., :head, head:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        hidden: torch.Tensor = model(input_ids=torch.tensor([[*encoder.head, *row]]), attention_mask=mask).last_hidden_state[0]
    return hidden[head:]


def test_attention_both_ways_lets_an_item_see_itself_whole_and_the_shared_sentence_no_item(base: Path) -> None:
    encoder = tiny.encoder(base, attention="both")
    source = prompts(encoder.tokenize(tiny.items(5)), np.arange(5), encoder.limit)[0]
    assert encoder.step(source).prefix == len(encoder.head)
    wanted = [plain_both(encoder, take(source, np.asarray([row])).token_T.tolist()).mean(0).numpy() for row in range(5)]
    np.testing.assert_allclose(embed(encoder, source), np.stack(wanted), atol=1e-4)
    assert not np.allclose(embed(tiny.encoder(base), source), np.stack(wanted), atol=1e-2)
    assert check_packing(encoder, source) > 0.9999


def test_a_base_that_attends_both_ways_by_itself_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='set attention to "base"'):
        tiny.encoder(tiny.bert(tmp_path / "bert"), attention="both")


def test_keys_that_came_later_are_written_only_where_they_say_something_and_an_older_artifact_reads(
    base: Path, tmp_path: Path
) -> None:
    for number, shape in enumerate(({}, {"attention": "both"}, {"suffix_tokens": 2})):
        encoder = tiny.encoder(base, **shape)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_encoder(folder, encoder.spec, None)
        told = json.loads((folder / SPEC).read_text())
        assert told.keys() & {"attention", "suffix_tokens"} == shape.keys()
        assert read_spec(folder) == encoder.spec
        assert of_base(read_spec(folder)) == tiny.encoder(base).spec


# ----------------------------------------------------------------------------------------------------------- suffix tokens


def learned(base: Path, config: Scft = STRONG, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Tuned, Encoder]:
    """Suffix tokens trained on 40 small items."""
    encoder = tiny.encoder(base, suffix_tokens=3, dtype=dtype)
    return fine_tune(encoder, encoder.tokenize(tiny.items(40)), config, seed=1, log=lambda *_: None, **more), encoder


def artifact(base: Path, folder: Path) -> tuple[Path, Encoder]:
    result, encoder = learned(base)
    folder.mkdir()
    save_encoder(folder, encoder.spec, result.learned)
    return folder, encoder


def test_suffix_tokens_are_what_an_item_is_pooled_over_and_all_that_learns(base: Path) -> None:
    untrained = tiny.encoder(base, suffix_tokens=3)
    assert untrained.suffix_SE is not None
    source = prompts(untrained.tokenize(tiny.items(4)), np.arange(4), untrained.limit)[0]
    # a suffix is words of the base until it learns: the plain model gives the same over the same words
    words = untrained.model.get_input_embeddings().weight  # type: ignore[operator]
    ids = [int((words == token).all(1).nonzero()[0]) for token in untrained.suffix_SE]
    model = AutoModel.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval()
    row = [*untrained.head, *take(source, np.asarray([2])).token_T.tolist(), *ids]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([row])).last_hidden_state[0, -3:].mean(0).numpy()
    np.testing.assert_allclose(embed(untrained, source)[2], wanted, atol=1e-4)
    before = {name: value.clone() for name, value in untrained.model.state_dict().items()}
    result, encoder = learned(base, dataclasses.replace(STRONG, steps=25, patience=99))
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert result.learned.keys() == {"suffix_SE"}
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())


def test_a_reloaded_encoder_with_suffix_tokens_embeds_as_the_one_that_was_saved(base: Path, tmp_path: Path) -> None:
    path, encoder = artifact(base, tmp_path / "artifact")
    assert {file.name for file in path.iterdir()} == {SUFFIX, SPEC}
    loaded = load_encoder(path, device=tiny.CPU, dtype=torch.float32)
    np.testing.assert_allclose(embed_items(loaded, tiny.items(7)), embed_items(encoder, tiny.items(7)), atol=1e-5)
    assert not np.allclose(embed_items(tiny.encoder(base, suffix_tokens=3), tiny.items(7)), embed_items(encoder, tiny.items(7)))


@pytest.mark.parametrize(
    ("change", "why"), [("missing", "not whole"), ("shape", r"are \(2, 32\)"), ("nan", "not finite"), ("still", "did not move")]
)
def test_suffix_tokens_that_do_not_fit_or_did_not_move_are_refused(base: Path, tmp_path: Path, change: str, why: str) -> None:
    path, _ = artifact(base, tmp_path / "artifact")
    state = load_file(path / SUFFIX)["suffix_SE"]
    start = tiny.encoder(base, suffix_tokens=3).suffix_SE
    assert start is not None
    broken = {"shape": state[:2], "nan": torch.full_like(state, torch.nan), "still": start.detach()}
    (path / SUFFIX).unlink()
    if change != "missing":
        save_file({"suffix_SE": broken[change].contiguous()}, path / SUFFIX)
    with pytest.raises(ValueError, match=why):
        load_encoder(path, device=tiny.CPU)


def test_suffix_tokens_resume(base: Path, tmp_path: Path) -> None:
    whole, _ = learned(base)
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        learned(base, checkpoint=file, stop=lambda: next(steps) >= 3)
    resumed, _ = learned(base, checkpoint=file)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.learned["suffix_SE"], whole.learned["suffix_SE"])


def test_suffix_tokens_learn_through_a_base_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tiny.llama(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    exact = learned(wide, SMALL, torch.bfloat16)[0]
    near = learned(wide, dataclasses.replace(SMALL, fp8=True), torch.bfloat16)[0]
    assert near.losses == pytest.approx(exact.losses, rel=0.2)
    assert near.losses != exact.losses


def test_suffix_tokens_learn_in_bf16_and_with_special_tokens_at_the_end(base: Path, tmp_path: Path) -> None:
    half, both_ways = tiny.encoder(base, suffix_tokens=2, dtype=torch.bfloat16), tiny.bert(tmp_path / "bert")
    for made in (half, tiny.encoder(both_ways, suffix_tokens=2)):
        result = fine_tune(made, made.tokenize(tiny.items(40)), STRONG, seed=1, log=lambda *_: None)
        assert result.learned["suffix_SE"].dtype == torch.float32
        assert len(set(result.losses)) > 1


def test_suffix_tokens_do_not_learn_from_users_titles(base: Path) -> None:
    encoder = tiny.encoder(base, suffix_tokens=2)
    texts = encoder.tokenize(tiny.items(40))
    users = users_of(encoder, np.arange(20), np.repeat(np.arange(5), 4), [f"film {n}" for n in range(40)])
    config = dataclasses.replace(SMALL, user_weight=1.0)
    with pytest.raises(ValueError, match="suffix tokens are learned from items"):
        fine_tune(encoder, texts, config, seed=1, log=lambda *_: None,
                  signals=Signals(users=users, cluster_I=np.arange(40) % 3))  # fmt: skip


def test_a_lower_rank_is_another_encoder(base: Path) -> None:
    assert tiny.encoder(base, lora=Lora(r=4)).spec != tiny.encoder(base, lora=Lora(r=8)).spec
