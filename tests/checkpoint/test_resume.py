"""A folder made piece by piece: what is done stays, what is not is thrown away."""

import os

import pytest

from dskjax.checkpoint.resume import Piece, bytes_there, fingerprint, resuming

JOB = {"version": 1, "conversion": {"dtype": None}, "source": {"a": "3 bytes"}}


class Stop(Exception):
    pass


def make(place, *, job=JOB, stop_after=None, overwrite=False, report=lambda count: None):
    """Makes a folder of two files and a folder; returns the names that this call wrote."""
    written = []
    with resuming(place, job, overwrite=overwrite, report=report) as pieces:
        if pieces.complete:
            return None
        for name in ("one", "two", "three"):
            if name not in pieces.done:
                if name == "three":
                    (pieces.folder / name / "inner").mkdir(parents=True)
                    (pieces.folder / name / "inner" / "x").write_text("xxx")
                else:
                    (pieces.folder / name).write_text(name)
                pieces.finish(name)
                written.append(name)
            if name == stop_after:
                pieces.wait()
                raise Stop
        pieces.wait()
        assert set(pieces.done) == {"one", "two", "three"}
        (pieces.folder / "last").write_text("text")
    return written


def stopped(place, after, **options):
    with pytest.raises(Stop):
        make(place, stop_after=after, **options)
    assert not place.exists()
    return place.with_name(f".{place.name}.part")


def whole(place):
    assert sorted(path.name for path in place.iterdir()) == ["last", "one", "three", "two"]
    assert (place / "three" / "inner" / "x").read_text() == "xxx"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_what_is_done_is_not_made_again(tmp_path):
    place = tmp_path / "a"
    assert bytes_there(place) == 0
    stopped(place, "two")
    assert bytes_there(place) == 6
    reported = []
    assert make(place, report=reported.append) == ["three"]
    assert reported == [3, 3]
    whole(place)


def test_pieces_that_are_not_as_they_were_written_are_made_again(tmp_path, caplog):
    place = tmp_path / "a"
    work = stopped(place, "two")
    (work / "new" / "one").write_text("onf")
    (work / "new" / "three").mkdir()  # begun, not finished
    (work / "new" / "four").write_text("unknown")
    assert make(place) == ["one", "three"]
    assert "one is not as it was written" in caplog.text
    whole(place)


def test_a_line_that_was_being_written_does_not_count(tmp_path):
    place = tmp_path / "a"
    work = stopped(place, "two")
    journal = work / "done.jsonl"
    journal.write_text(journal.read_text()[:-20])
    stopped(place, "two")  # the next process writes its own lines after it
    assert make(place) == ["three"]
    whole(place)


def test_another_job_begins_anew_only_when_asked(tmp_path):
    place = tmp_path / "a"
    work = stopped(place, "two")
    for job, says in [
        (JOB | {"conversion": {"dtype": "float32"}}, "conversion.dtype = None, which is 'float32'"),
        (JOB | {"source": {"a": "4 bytes"}}, "source.a = '3 bytes', which is '4 bytes' now"),
        (JOB | {"source": {"b": "3 bytes"}}, "source.a = '3 bytes', which is None now"),
    ]:
        with pytest.raises(ValueError, match="--overwrite") as refused:
            make(place, job=job)
        assert says in str(refused.value) and str(work) in str(refused.value)
    assert make(place, job=job, overwrite=True) == ["one", "two", "three"]
    whole(place)


def test_the_place_must_be_free(tmp_path):
    place = tmp_path / "a"
    place.mkdir()
    make(place)  # an empty folder is free
    with pytest.raises(FileExistsError, match="--overwrite"):
        make(place)
    with pytest.raises(FileExistsError, match="not a checkpoint folder"):
        make(place, overwrite=True)
    whole(place)
    (place / "config.json").write_text("{}")
    assert make(place, overwrite=True) == ["one", "two", "three"]
    whole(place)


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    place = tmp_path / "a"
    with pytest.raises(FileExistsError, match="exists already"):
        with resuming(place, JOB, overwrite=False) as pieces:
            (pieces.folder / "one").write_text("one")
            pieces.finish("one")
            place.mkdir()
            (place / "thesis.txt").write_text("precious")
    assert (place / "thesis.txt").read_text() == "precious"


def test_what_was_moved_but_not_cleaned_up_is_complete(tmp_path, monkeypatch):
    place = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr("dskjax.checkpoint.resume._remove", lambda work: None)
        make(place)
    assert len(list(tmp_path.iterdir())) == 2
    assert make(place) is None
    whole(place)


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    place = tmp_path / "a"
    make(place)
    (place / "config.json").write_text("{}")
    rename = type(place).rename

    def broken(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(place), "rename", broken)
        with pytest.raises(OSError, match="Input/output"):
            make(place, overwrite=True)
    assert (place / "config.json").read_text() == "{}"
    assert make(place, overwrite=True) == []
    whole(place)


def test_one_process_at_a_time(tmp_path):
    place = tmp_path / "a"
    with resuming(place, JOB, overwrite=False):
        with pytest.raises(ValueError, match="another process is writing there"):
            make(place)


def test_an_error_while_writing_down_is_raised(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "a")


def test_fingerprints_see_names_sizes_and_bytes(tmp_path):
    folder = tmp_path / "f"
    (folder / "b").mkdir(parents=True)
    (folder / "a").write_bytes(b"12")
    (folder / "b" / "c").write_bytes(b"3")
    first = fingerprint(folder)
    assert first.nbytes == 3 and fingerprint(folder) == first
    assert fingerprint(folder / "a") == Piece(
        2, "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    )
    (folder / "b" / "c").write_bytes(b"4")
    assert fingerprint(folder) != first
    (folder / "b" / "c").write_bytes(b"3")
    (folder / "a").rename(folder / "d")
    assert fingerprint(folder) != first
    (folder / "d").write_bytes(b"1")
    (folder / "b" / "c").write_bytes(b"23")
    assert fingerprint(folder).nbytes == 3 and fingerprint(folder) != first
