"""Captions, the held-out triples, and the tokenizer that knows every word."""

from __future__ import annotations

import json
import random

from samples.models import MODELS, path, world
from samples.models.world import Scene, Thing


def test_captions_say_all_and_can_leave_parts_unsaid() -> None:
    thing = Thing("red", "circle", "up-left", "quickly", "striped", "small")
    scene = Scene((thing, Thing("blue", "star", "down")), "grey", "cloudy", "left")
    assert scene.caption() == (
        "a small striped red circle moves up-left quickly and a large blue star moves down slowly, "
        "cloudy grey background, camera pans left"
    )
    assert scene.caption(world.PARTS) == "a red circle moves up-left and a blue star moves down"


def test_one_sixth_of_the_triples_is_held_out_and_every_pair_is_seen() -> None:
    triples = [Thing(c, s, d) for c in world.COLOURS for s in world.SHAPES for d in world.DIRECTIONS]
    seen = [t for t in triples if not world.is_held_out(t)]
    assert (len(triples), len(seen)) == (384, 320)
    assert len({(t.colour, t.shape) for t in seen}) == 8 * 6
    assert len({(t.colour, t.direction) for t in seen}) == 8 * 8
    assert len({(t.shape, t.direction) for t in seen}) == 6 * 8


def test_drawn_scenes_keep_to_their_side() -> None:
    rng = random.Random(0)
    drawn = [thing for _ in range(200) for thing in world.draw(rng).things]
    assert not any(world.is_held_out(thing) for thing in drawn)
    unseen = world.unseen()
    assert len({scene.things for scene in unseen}) == 64
    assert all(world.is_held_out(scene.things[0]) for scene in unseen)


def test_every_word_of_a_caption_is_one_token() -> None:
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(path("wan-tiny") / "tokenizer")
    rng = random.Random(1)
    for _ in range(50):
        caption = world.draw(rng).caption()
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption).input_ids) == len(words) + 1
    assert tokenizer.unk_token_id not in tokenizer("a zebra walks").input_ids


def test_the_models_are_small_and_complete() -> None:
    for name in set(MODELS.values()):
        files = [file for file in path(name).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 9 * 2**20
        names = {file.relative_to(path(name)).as_posix() for file in files}
        assert {"transformer/config.json", "defaults.json", "README.md", "LICENSE-DATA"} <= names
        assert not any(file.suffix in {".bin", ".pt", ".pkl", ".ckpt"} for file in files)
        assert not any(file.is_symlink() for file in path(name).rglob("*"))
        if name == MODELS.get("sample-causal"):  # a transformer alone, which shares all other parts with wan-tiny
            assert "rollout.json" in names
            continue
        index = json.loads((path(name) / "model_index.json").read_text())
        parts = [part for part, entry in index.items() if isinstance(entry, list) and entry[0]]
        assert all((path(name) / part).is_dir() for part in parts)
