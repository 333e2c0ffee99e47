"""Hashes of files depend on all files of a folder, also behind links."""

from pathlib import Path

from spear.util.fingerprints import hash_names_sizes_and_tails


def test_files_behind_links_are_hashed_even_if_the_links_form_a_circle(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    linked = tmp_path / "linked"
    dataset.mkdir()
    linked.mkdir()
    (dataset / "external").symlink_to(linked)
    (linked / "back").symlink_to(dataset)

    hashes = set()
    for text in ("one", "two"):
        (linked / "labels-0.parquet").write_text(text)
        hashes.add(hash_names_sizes_and_tails([dataset], ["*.parquet"]))

    assert len(hashes) == 2
