"""Laws of the card: it states what a reader needs, and nothing that is not known."""

from __future__ import annotations

from pathlib import Path

from hub_helpers import REPO, chain
from loopback_hub import TOKEN, LoopbackHub

from gradcodec import hub
from gradcodec.codec.folder import folder_of
from gradcodec.codecs import Identity


def test_card_states_what_a_reader_needs(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: gradcodec\ntags: [")
    for words in (
        "subspace > blockquant",
        "8 update elements per code value",
        "576 elements in 2 tensors",
        "about 72 values, 36 bytes at 4 bits",
        f"{chain().weight_nbytes} bytes in 2 tensors",
        chain().digest.hex(),
        "Codec.from_pretrained(",
        "fitted on: not stated",
    ):
        assert words in text


def test_pushed_card_names_its_repository(server: LoopbackHub) -> None:
    chain().push_to_hub(REPO, token=TOKEN)
    repo = server.repos["model", REPO]
    card = repo.commits[repo.branches["main"]]["README.md"].data
    assert isinstance(card, bytes)
    assert f'Codec.from_pretrained("{REPO}")' in card.decode()


def test_given_card_and_notes_are_kept(tmp_path: Path) -> None:
    folder = folder_of(chain())
    noted = hub.Folder(
        folder.config, folder.spec, folder.weights, folder.digests, folder.digest, "tiny stories"
    )
    hub.write(tmp_path, noted)
    assert "fitted on: tiny stories" in (tmp_path / "README.md").read_text()
    assert hub.read(tmp_path).notes == "tiny stories"
    hub.write(tmp_path, noted, card="mine")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_card_of_an_unbound_codec_claims_no_size(tmp_path: Path) -> None:
    Identity().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "not bound" in text
    assert "| code |" not in text
    assert "| ratio |" not in text
