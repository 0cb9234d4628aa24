"""The index of a source: the same as reading it, built once, anew when something changes, interrupted or not."""
from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import fit_pairs, load_sources, read_image_sizes
from PIL import Image

from mindformers_ixc.data import mixture
from mindformers_ixc.data.conversations import ReadingOptions, load_conversations
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index import building, sources
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.index.samples import make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.rows import ConversationTable, SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.data.sampling import PlanSampler
from mindformers_ixc.errors import DataError, ImageError, SampleError

SECTION = {"tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"},
           "hd_num": 4, "image_size": 56}


def measures(**more):
    section = {**SECTION, **more}
    return measures_of(section, make_processor(SectionOptions(section), own_tokenizer(section)))


def write(folder, count=40, name="data.json"):
    rng = np.random.default_rng(7)
    for number in range(5):
        Image.new("RGB", (50 + 40 * number, 60)).save(folder / f"{number}.png")
    rows = []
    for number in range(count):
        turns = []
        for turn in range(int(rng.integers(1, 4))):
            text = ("<image>" if number % 3 and not turn else "") + "what is it? " * int(rng.integers(1, 9))
            turns += [{"from": "human", "value": text}, {"from": "gpt", "value": "a cat"}]
        rows.append({"id": number, "conversations": turns,
                     **({"image": f"{number % 5}.png"} if number % 3 else {})})
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def columns(index):
    return {name: np.array(getattr(index, name)) for name in ("places", "sizes", "pair_starts", "needs")}


def test_an_index_says_what_reading_the_source_says(tmp_path):
    path, how = write(tmp_path), measures()
    samples = load_conversations(path)
    read_image_sizes(samples)
    shapes = Shapes(60, 4, 4, max_images=1)
    found = list(make_samples(open_sources({"dataset_dir": str(path)}, 0, how, tmp_path / "index"), shapes, 0.01,
                              tmp_path / "index"))
    expected = [fit_pairs(how.processor, sample, 60, 4, 4, 1) for sample in samples]
    kept = [(sample, pairs, needed) for sample, (pairs, needed) in zip(samples, expected) if pairs]
    assert 0 < len(kept) < len(samples)
    assert [one.id for one in found] == [sample.id for sample, _, _ in kept]
    for one, (sample, pairs, needed) in zip(found, kept):
        assert one.turns == sample.turns[:2 * pairs]
        assert (one.images, one.sizes) == (sample.images, sample.sizes)
        assert how.processor.conversation_length(one.turns, one.sizes, 4) == needed


def test_workers_measure_what_one_process_measures(tmp_path, monkeypatch):
    path, how = write(tmp_path, 50), measures()
    alone = columns(open_index(path, ReadingOptions(), how, tmp_path / "alone"))
    monkeypatch.setattr(building, "FEW", 0)
    monkeypatch.setattr(building, "PART", 7)
    progress = []
    monkeypatch.setattr(building, "_follow", lambda workers, logs, update, follow=building._follow: follow(
        workers, logs, lambda count: (progress.append(count), update(count))))
    together = columns(open_index(path, ReadingOptions(), how, tmp_path / "together"))
    assert sum(progress) >= 50
    for name, column in alone.items():
        np.testing.assert_array_equal(column, together[name])


def test_an_interrupted_index_goes_on(tmp_path, monkeypatch):
    path, how, measured = write(tmp_path, 40), measures(), []
    whole = columns(open_index(path, ReadingOptions(), how, tmp_path / "whole"))
    monkeypatch.setattr(building, "PART", 10)
    save = building.save_part

    def interrupted(place, part):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(place.name)
        save(place, part)

    monkeypatch.setattr(building, "save_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_index(path, ReadingOptions(), how, tmp_path / "index")
    monkeypatch.setattr(building, "save_part", lambda place, part: (measured.append(place.name), save(place, part)))
    for name, column in columns(open_index(path, ReadingOptions(), how, tmp_path / "index")).items():
        np.testing.assert_array_equal(column, whole[name])
    assert measured == [f"{number:06d}.npz" for number in range(4)]


def builds(monkeypatch):
    """Names of the sources that are measured from now on."""
    seen, build = [], building._Builder.build
    monkeypatch.setattr(building._Builder, "build",
                        lambda self, description, *more: (seen.append(description.source),
                                                          build(self, description, *more)))
    return seen


def test_an_index_is_built_once_and_anew_when_something_changes(tmp_path, monkeypatch):
    path, seen = write(tmp_path), builds(monkeypatch)

    def opened(options=None, **more):
        open_index(path, options or ReadingOptions(), measures(**more), tmp_path / "index")
        count = len(seen)
        seen.clear()
        return count

    assert [opened(), opened()] == [1, 0]
    assert [opened(hd_num=2), opened(), opened(seq_length=99)] == [1, 0, 0]
    assert opened(ReadingOptions(image_folder=str(tmp_path))) == 1
    os.utime(tmp_path / "1.png", ns=(1, 1))                  # a picture was replaced
    assert [opened(), opened()] == [1, 0]
    path.write_text(path.read_text() + "\n")
    assert [opened(), opened()] == [1, 0]
    folders = [place for place in (tmp_path / "index").iterdir() if place.name.startswith("data.json")]
    assert len([one for one in folders[0].iterdir() if one.is_dir()]) == 1     # those of the file before are gone


def test_samples_follow_a_picture_that_was_replaced(tmp_path):
    path = write(tmp_path)

    def opened():
        sources = open_sources({"dataset_dir": str(path)}, 0, measures(), tmp_path / "index")
        return make_samples(sources, Shapes(10_000, 99, 4), 0.01, tmp_path / "index")

    before = np.array(opened().needs)
    Image.new("RGB", (60, 230)).save(tmp_path / "1.png")
    after = opened()
    assert (before[1] != after.needs[1]).any()
    sample = after[1]
    assert measures().processor.conversation_length(sample.turns, sample.sizes, 4) == tuple(after.needs[1].tolist())


def test_a_picture_that_went_away_is_as_a_damaged_one(tmp_path):
    path = write(tmp_path)
    samples = make_samples(open_sources({"dataset_dir": str(path)}, 0, measures(), tmp_path / "index"),
                           Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    (tmp_path / "1.png").unlink()
    with pytest.raises(ImageError, match=r"sample 1 .*1\.png does not exist"):
        samples[1]
    assert samples[2].images
    assert "sample 1" in samples.where(1)


def test_workers_that_say_much_are_not_stopped_by_it(tmp_path, monkeypatch):
    path, how = write(tmp_path, 50), measures()
    monkeypatch.setattr(building, "FEW", 0)
    monkeypatch.setattr(building, "PART", 7)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.stderr.write('warning ' * 50_000)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    index = open_index(path, ReadingOptions(), how, tmp_path / "index")
    assert len(index) == 50
    assert not list(index.folder.glob("*.log"))


def test_relative_names_are_looked_for_anew_from_another_folder(tmp_path, monkeypatch):
    path = write(tmp_path)
    folders = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        folders.add(open_index(path, ReadingOptions(), measures(), tmp_path / "index").folder)
        folders.add(open_index(path, ReadingOptions(image_folder=str(tmp_path)), measures(), tmp_path / "index").folder)
    assert len(folders) == 3          # with a folder of their own, the pictures are the same ones from everywhere


def test_a_damaged_index_is_built_anew(tmp_path, monkeypatch):
    path, how = write(tmp_path), measures()
    folder = open_index(path, ReadingOptions(), how, tmp_path / "index").folder
    expected = np.load(folder / "needs.npy")
    (folder / "needs.npy").write_bytes((folder / "needs.npy").read_bytes()[:-8])
    seen = builds(monkeypatch)
    np.testing.assert_array_equal(open_index(path, ReadingOptions(), how, tmp_path / "index").needs, expected)
    assert seen == [str(path)]


def test_errors_leave_no_index_and_name_the_samples(tmp_path):
    path = write(tmp_path)
    rows = json.loads(path.read_text())
    rows[4]["image"] = "nowhere.png"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"sample 4 .*nowhere\.png does not exist"):
        open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    rows[4]["image"] = "1.png"
    (tmp_path / "1.png").write_bytes(b"no picture")
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"sample 1 .*1\.png is no image file"):
        open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    assert not list((tmp_path / "index").glob("data.json-*/*/index.json"))
    found = open_index(path, ReadingOptions(), measures(), tmp_path / "index", bad_share=1.0)
    assert [number for number, _ in found.description.errors] == [1, 4, 11, 16, 26, 31]
    assert len(found) == 40
    assert (np.diff(found.pair_starts)[[1, 4]] == 0).all()
    with pytest.raises(DataError, match=r"1\.png is no image file"):
        open_index(path, ReadingOptions(), measures(), tmp_path / "index")


def test_pixels_are_read_where_that_is_asked_for(tmp_path):
    path = write(tmp_path)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:60])
    plain, decoding = measures(), measures_of(SECTION, measures().processor, decode=True)
    assert not open_index(path, ReadingOptions(), plain, tmp_path / "index").description.errors
    found = open_index(path, ReadingOptions(), decoding, tmp_path / "index", bad_share=1.0)
    assert found.description.errors
    assert all("1.png" in sentence and "damaged" in sentence for _, sentence in found.description.errors)


def test_equal_samples_have_equal_digests(tmp_path):
    path = write(tmp_path)
    rows = json.loads(path.read_text())
    rows[7] = {**rows[3], "id": "another"}
    path.write_text(json.dumps(rows))
    digests = open_index(path, ReadingOptions(), measures(), tmp_path / "index").digests
    values, counts = np.unique(digests, return_counts=True)
    assert values[counts > 1].tolist() == [digests[3]]


def test_a_worker_that_ends_is_told(tmp_path, monkeypatch):
    path, how = write(tmp_path, 50), measures()
    monkeypatch.setattr(building, "FEW", 0)
    monkeypatch.setattr(building, "PART", 7)
    monkeypatch.setattr(building, "JOB", "nothing.json")
    with pytest.raises(DataError, match=r"A process that measures samples has ended: .*No such file.*kept"):
        open_index(path, ReadingOptions(), how, tmp_path / "index")


def test_one_process_builds_and_the_others_wait(tmp_path):
    path = write(tmp_path, 300)
    code = ("import sys, test_index as t; from mindformers_ixc.data.index import building\n"
            "save = building.save_part\n"
            "def slow(place, part):\n"
            "    import time; time.sleep(0.5); print('measured', flush=True); save(place, part)\n"
            "building.save_part = slow\n"
            "t.open_index(sys.argv[1], t.ReadingOptions(), t.measures(), sys.argv[2])")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "index")], env=environment,
                                stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum(output.count("measured") for output in outputs) == 1


def test_a_list_file_draws_as_it_does_of_samples_in_memory(tmp_path):
    write(tmp_path)
    (tmp_path / "list.txt").write_text("data.json 0.1\n")

    expected = [sample.id for sample in load_sources(str(tmp_path / "list.txt"), seed=5)]
    sources = open_sources({"dataset_dir": str(tmp_path / "list.txt")}, 5, measures(), tmp_path / "index")
    found = make_samples(sources, Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    assert [sample.id for sample in found] == expected
    assert len(expected) == 100


def test_a_saved_plan_is_the_plan_and_is_made_once(tmp_path):
    made = []

    def make(batch_rows):
        made.append(batch_rows)
        multimodal = np.arange(30) % 3 > 0
        return mixture.make_planner(np.zeros(30, np.int32), multimodal, ["a"], None, 3, True, True)(batch_rows)

    plain, planner = make(4), saved(make, tmp_path, "something")
    made.clear()
    first = planner(4)
    assert first.batch(3) == plain.batch(3)
    assert [first.batch(step) for step in range(20)] == [plain.batch(step) for step in range(20)]
    first.check(5)
    assert made == [4]
    second = planner(4)
    assert [second.batch(step) for step in range(20)] == [plain.batch(step) for step in range(20)]
    second.check(4)
    assert made == [4]
    assert (second.epoch_rows, second.mean_samples) == (plain.epoch_rows, plain.mean_samples)
    assert saved(make, tmp_path, "another")(4).batch(0) == plain.batch(0)
    assert made == [4, 4]


def test_a_copy_of_a_table_has_its_columns_in_the_same_memory(tmp_path):
    """MindSpore copies what a data set reads from; mapped columns would be read into memory, a rank's own."""
    sources = open_sources({"dataset_dir": str(write(tmp_path))}, 0, measures(), tmp_path / "index")
    found = make_samples(sources, Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    table = ConversationTable(measures().processor, found, 10_000, 99, 4, needs=found.needs)
    copied = copy.deepcopy(table)
    assert np.shares_memory(copied.needs, found.needs) and isinstance(copied.needs, np.memmap)
    assert copied.samples is found


def test_samples_and_rows_are_the_same_after_their_columns_were_let_go_of(tmp_path, monkeypatch):
    sources = open_sources({"dataset_dir": str(write(tmp_path))}, 0, measures(), tmp_path / "index")
    found = make_samples(sources, Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    assert found.multimodal == np.count_nonzero(found.images)
    planner = saved(mixture.make_planner(found.name_numbers, found.images > 0, found.names, None, 0, True, True),
                    tmp_path / "index", "a run")
    rows, samples = [planner(2).row(place) for place in range(10)], list(found)
    for module in ("samples", "plans"):
        monkeypatch.setattr(f"mindformers_ixc.data.index.{module}.LOOKS", 1)
    plan = planner(2)
    assert list(found) == samples
    assert [plan.row(place) for place in range(10)] == rows


def test_a_source_that_changed_is_compared_with_the_index(tmp_path):
    path = write(tmp_path)
    samples = make_samples(open_sources({"dataset_dir": str(path)}, 0, measures(), tmp_path / "index"),
                           Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    assert samples[1].turns
    before = samples[2].turns
    unread = make_samples(open_sources({"dataset_dir": str(path)}, 0, measures(), tmp_path / "index"),
                          Shapes(10_000, 99, 4), 0.01, tmp_path / "index")
    time.sleep(0.01)
    path.write_text(path.read_text() + " ")
    assert samples[2].turns == unread[2].turns == before          # what was appended changes no sample
    path.write_text(path.read_text().replace("what is it?", "what was it"))
    for one in (samples, unread):
        with pytest.raises(SampleError, match="is not what it was when the data were indexed"):
            one[2]


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), weights=st.booleans(), seed=st.integers(0, 3),
       batch=st.sampled_from([4, 8]))
def test_any_number_of_ranks_sees_the_same_samples(tmp_path_factory, counts, weights, seed, batch):
    numbers = np.repeat(np.arange(len(counts)), counts)
    multimodal = np.arange(len(numbers)) % 3 > 0
    section = {"weights": [1 + number for number in range(len(counts))], "samples_per_epoch": 80} if weights else None
    folder = tmp_path_factory.mktemp("plans")
    seen = []
    for ranks in (1, 2, 4):
        planner = saved(mixture.make_planner(numbers, multimodal, list("abc")[:len(counts)], section, seed, True, True),
                        folder, seed, weights, ranks)          # each makes its own
        plan = planner(batch)
        samplers = [PlanSampler(plan, batch // ranks, (rank, ranks)) for rank in range(ranks)]
        places = [np.concatenate([sampler.take() for _ in range(2)]).reshape(-1, batch // ranks)
                  for sampler in samplers]
        seen.append([plan.row(place) for step in zip(*places) for rank in step for place in rank.tolist()])
    assert seen[0] == seen[1] == seen[2]
    if not weights:
        epoch = [row[0] for row in seen[0][:len(seen[0]) // 2]]
        kinds = [int(multimodal.sum()), int((~multimodal).sum())]
        if all(kind == 0 or kind >= batch for kind in kinds):
            assert len(set(epoch)) == len(epoch)              # each at most once; what fills no batch is left out
            assert len(epoch) == sum(kind // batch * batch for kind in kinds)


@pytest.mark.parametrize("limit", [1 << 27, 1000])
def test_tables_with_large_row_groups_are_named(tmp_path, monkeypatch, caplog, limit):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    for name, count in (("small", 1), ("large", 50)):
        pq.write_table(pa.Table.from_pylist([{"id": f"{number}" * 20, "conversations": turns}
                                             for number in range(count)]), tmp_path / f"{name}.parquet")
    monkeypatch.setattr(sources, "GROUP_BYTES", limit)
    names = [str(tmp_path / f"{name}.parquet") for name in ("small", "large")]
    with caplog.at_level("WARNING"):
        open_sources({"dataset_dir": names}, 0, measures(), tmp_path / "index")
    said = [record.getMessage() for record in caplog.records if "row groups" in record.getMessage()]
    assert len(said) == (limit == 1000)
    assert all(text.startswith(f"{tmp_path / 'large.parquet'} has row groups of up to") for text in said)
