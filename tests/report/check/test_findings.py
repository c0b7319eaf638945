import pytest

from torchrelay.report.check.findings import Finding


@pytest.mark.parametrize(
    ("title", "of_one"),
    [
        ("test images are in the training data as well", "test image is in the training data as well"),
        ("training rows are exact copies of others", "training row is an exact copy of another"),
        ("pairs of equal images have two classes", "pair of equal images has two classes"),
        ("classes have less than a tenth of the largest one's training samples",) * 2,
        ("image files can't be decoded", "image file can't be decoded"),
        ("error would stop a training", "error would stop a training"),
    ],
)
def test_a_heading_agrees_with_its_number(title, of_one):
    one = of_one.replace("classes have less", "class has less")
    assert Finding(title, 1, (), "").heading == one
    assert Finding(title, 2, (), "").heading == title
