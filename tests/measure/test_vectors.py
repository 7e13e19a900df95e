import torch

from colossus.measure import vectors
from colossus.measure.vectors import VectorProduct, quickest_vector_product


def test_the_quickest_way_is_measured_and_threads_are_left():
    threads = torch.get_num_threads()
    ways = vectors._vector_products()
    assert {way.type for way in ways} == {"fp32", "bf16"} and all(way.seconds > 0 for way in ways)
    assert torch.get_num_threads() == threads
    fp32 = [way for way in ways if way.type == "fp32"]
    assert quickest_vector_product(torch.float32) == min(fp32, key=lambda way: way.seconds)


def test_a_narrower_type_must_be_clearly_quicker(monkeypatch):
    for seconds, expected in ((0.9, "fp32"), (0.5, "bf16"), (130.0, "fp32")):
        ways = (VectorProduct("fp32", False, 1.0), VectorProduct("bf16", True, seconds))
        monkeypatch.setattr(vectors, "_vector_products", lambda ways=ways: ways)
        assert quickest_vector_product().type == expected
        assert quickest_vector_product(torch.bfloat16).packed
