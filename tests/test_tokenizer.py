import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambapy.errors import DataError
from mambapy.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_interface():
    tokenizer = ByteTokenizer()
    assert len(tokenizer) == 257
    both = tokenizer(["ab", "c"], padding=True)
    assert both["input_ids"] == [[97, 98], [99, 256]]
    assert both["attention_mask"] == [[1, 1], [1, 0]]
    assert tokenizer(["ab", "c"])["input_ids"] == [[97, 98], [99]]
    assert tokenizer.decode([97, 256, 98]) == "a<|endoftext|>b"
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    with pytest.raises(DataError, match="max_length"):
        tokenizer("a", max_length=3)
    with pytest.raises(DataError, match="valid Unicode"):
        tokenizer("\ud800")


def test_files(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "mamba": 1, "<|endoftext|>": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.save(str(tmp_path / "my.json"))
    tokenizer = load_tokenizer(tmp_path / "my.json")
    assert tokenizer("mamba")["input_ids"] == [1]
    assert tokenizer(["mamba", "x"])["input_ids"] == [[1], [0]]
    assert tokenizer.decode([1]) == "mamba"
    assert tokenizer.eos_token_id == 2
    assert len(tokenizer) == 3
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path)("mamba")["input_ids"] == [1]
    assert FileTokenizer(tmp_path / "my.json", eos="mamba").eos_token_id == 1
    with pytest.raises(DataError, match="no token '<end>'"):
        FileTokenizer(tmp_path / "my.json", eos="<end>")
    with pytest.raises(DataError, match="takes no padding"):
        tokenizer("mamba", padding=True)


def test_folders_and_bad_files(tmp_path):
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer file"):
        load_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
