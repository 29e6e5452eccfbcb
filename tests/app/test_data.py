"""Digits and image folders: shapes, fixed splits, augmentation, and every kind of broken folder."""

import pytest
import torch
from PIL import Image

from hawq_lightning import HawqError
from hawq_lightning.data import DigitsDataModule, ImageFolderDataModule, TensorImages


def paint(folder, classes=("cat", "dog"), splits=("train", "val"), images=6, size=(20, 16)):
    for split in splits:
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", size, (40 * label + 10, 5 * i, 200)).save(folder / split / name / f"{i}.png")
    return folder


def make(root, **changes):
    module = ImageFolderDataModule(root, **({"size": 8, "batch_size": 4, "augment": "none"} | changes))
    module.setup()
    return module


def test_digits_split_is_fixed_stratified_and_disjoint():
    first, second = DigitsDataModule(shift=0), DigitsDataModule(shift=0)
    first.setup()
    second.setup()
    train, val = first._sets["train"], first._sets["val"]
    assert (len(train), len(val)) == (1257, 540)
    assert torch.equal(val.images, second._sets["val"].images)
    counts = torch.bincount(val.labels)
    assert counts.min() >= 50 and counts.max() <= 58
    assert train.images.mean().abs() < 1e-5 and abs(float(train.images.std()) - 1) < 1e-5
    images, labels = next(iter(first.train_dataloader()))
    assert images.shape == (64, 1, 8, 8) and labels.dtype == torch.int64


def test_shifts_follow_torchs_generator_and_fill_the_border():
    images = torch.arange(16.0).reshape(1, 1, 4, 4) + 1
    data = TensorImages(images, torch.tensor([3]), shift=1, fill=-7.0)
    torch.manual_seed(5)
    first = [data[0][0] for _ in range(20)]
    torch.manual_seed(5)
    assert all(torch.equal(a, data[0][0]) for a in first)
    kinds = {tuple(x.flatten().tolist()) for x in first}
    assert len(kinds) > 3 and all(len(k) == 16 for k in kinds)
    assert any(-7.0 in k for k in kinds)


@pytest.mark.parametrize("wrong", [{"shift": 9}, {"held_out": 5}, {"batch_size": 0}, {"subset": 0}])
def test_digits_refuse_settings_out_of_range(wrong):
    with pytest.raises(HawqError, match=next(iter(wrong))):
        DigitsDataModule(**wrong)


def test_folder_reads_normalises_and_numbers_the_classes(tmp_path):
    module = make(paint(tmp_path), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), num_classes=2)
    assert module.classes == ["cat", "dog"]
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 0, 0, 0]
    assert images[1, :, 4, 4].mul(255).round().tolist() == [10, 5, 200]


def test_memory_and_files_give_the_same_pixels(tmp_path):
    paint(tmp_path)
    kept, read = make(tmp_path, memory=True), make(tmp_path)
    for a, b in zip(kept.val_dataloader(), read.val_dataloader()):
        assert torch.allclose(a[0], b[0], atol=1e-6) and torch.equal(a[1], b[1])


def test_augmentations_change_training_images_only(tmp_path):
    paint(tmp_path)
    for split in ("train", "val"):  # something to move and to mirror
        for path in (tmp_path / split).rglob("*.png"):
            Image.effect_noise((20, 16), 60).convert("RGB").save(path)
    for changes in ({"augment": "shift_flip", "memory": True, "shift": 2}, {"augment": "resized_crop"}):
        module = make(tmp_path, **changes)
        train, val = module._sets["train"], module._sets["val"]
        seen = [train[0][0] for _ in range(8)]
        assert all(x.shape == (3, 8, 8) for x in seen)
        assert len({tuple(x.flatten().tolist()) for x in seen}) > 2
        assert torch.equal(val[0][0], val[0][0])


@pytest.mark.parametrize("size", [(500, 20), (224, 224), (3, 400)])
def test_random_crops_of_long_and_flat_images_are_squares(tmp_path, size):
    module = make(paint(tmp_path, size=size, images=3), augment="resized_crop")
    for image, _ in module._sets["train"]:
        assert image.shape == (3, 8, 8) and image.isfinite().all()


def test_centre_crop_keeps_the_middle(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        image = Image.new("RGB", (40, 20))
        image.paste((255, 255, 255), (10, 0, 30, 20))
        image.save(tmp_path / split / "only" / "a.png")
    module = make(tmp_path, resize=8, size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = module._sets["val"][0][0]
    assert seen[:, :, 1:-1].min() == 1.0 and seen.min() > 0.8  # the scaling's filter reaches a pixel over the edge


def test_subset_covers_all_classes(tmp_path):
    module = make(paint(tmp_path, images=10), subset=4)
    labels = [label for _, label in module._sets["train"]]
    assert sorted(labels) == [0, 0, 1, 1]


def test_held_out_images_are_never_trained_on(tmp_path):
    root = paint(tmp_path, images=10)
    files = {}
    for on in ("val", "held_out"):
        for subset in (None, 6):
            module = make(root, held_out=4, train_subset=subset, evaluate_on=on, memory=False)
            files[on, subset] = {k: {path for path, _ in v.files} for k, v in module._sets.items()}
    apart = files["held_out", 6]["val"]
    assert apart == files["held_out", None]["val"] and len(apart) == 4
    assert sorted(p.parent.name for p in apart) == ["cat"] * 2 + ["dog"] * 2
    for (on, subset), found in files.items():
        assert len(found["train"]) == (subset or 16) and not found["train"] & apart
        assert all("val" in p.parts for p in found["val"]) is (on == "val")
    assert files["val", 6]["train"] == files["held_out", 6]["train"]
    assert (
        make(root, held_out=4, split_seed=1, memory=False)._sets["train"].files
        != make(root, held_out=4, memory=False)._sets["train"].files
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"evaluate_on": "test"}, "val or held_out"), ({"evaluate_on": "held_out"}, "at least 1"),
     ({"train_subset": 0}, "at least 1"), ({"held_out": 15, "train_subset": 6}, "need 21 images; .* has 20")],
)  # fmt: skip
def test_wrong_parts_of_the_training_split(tmp_path, wrong, said):
    with pytest.raises(HawqError, match=said):
        make(paint(tmp_path, images=10), memory=False, **wrong)


def test_missing_folder(tmp_path):
    with pytest.raises(HawqError, match="No image folder at .*nowhere"):
        make(tmp_path / "nowhere")


def test_empty_class_and_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(HawqError, match="holds no class folders"):
        make(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(HawqError, match="cat holds no image"):
        make(tmp_path)


def test_classes_that_differ_between_splits(tmp_path):
    paint(tmp_path, splits=("train",))
    paint(tmp_path, classes=("cat", "dogs"), splits=("val",))
    with pytest.raises(HawqError, match="Class folder 'dog' .*is in .*train only.*Did you mean 'dogs'"):
        make(tmp_path)


def test_classes_that_do_not_match_the_head(tmp_path):
    with pytest.raises(HawqError, match="2 class folders, the model's head 10 outputs; set model.num_classes=2"):
        make(paint(tmp_path), num_classes=10)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_corrupt_image_is_named(tmp_path, damage):
    paint(tmp_path, size=(64, 64))
    path = tmp_path / "train" / "dog" / "3.png"
    path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:60])
    module = make(tmp_path)
    with pytest.raises(HawqError, match=r"dog/3\.png cannot be read"):
        for _ in module.train_dataloader():
            pass
    with pytest.raises(HawqError, match=r"dog/3\.png cannot be read"):
        make(tmp_path, memory=True)
    if damage == "text":
        with pytest.raises(HawqError, match=r"dog/3\.png cannot be read"):
            make(tmp_path, checked=True)


def test_settings_that_exclude_each_other(tmp_path):
    with pytest.raises(HawqError, match="needs data.memory=true"):
        make(tmp_path, augment="shift_flip")
    with pytest.raises(HawqError, match="keeps images at one size"):
        make(tmp_path, augment="resized_crop", memory=True)
    with pytest.raises(HawqError, match="'flip' is unknown"):
        make(tmp_path, augment="flip")
