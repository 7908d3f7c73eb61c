import pytest

from snella_lab.recipes.dreambooth.data import fill, read_prompt_file

DREAMBOOTH_PROMPTS = """Classes

subject_name,class
dog6,dog
sloth_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a shelf'.format(unique_token, class_token),
'a shiny {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} on a shelf'.format(unique_token, class_token),
'a {0} {1} in a {0} coat'.format(unique_token, class_token),
"a {0} {1} that isn't wet".format(unique_token, class_token)
]
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_dreambooth_file_has_two_prompt_lists_and_classes(tmp_path):
    prompts = read_prompt_file(write(tmp_path / "prompts_and_classes.txt", DREAMBOOTH_PROMPTS))
    assert prompts.objects == ["a {0} {1} on a shelf", "a shiny {0} {1}"]
    assert prompts.live == ["a {0} {1} on a shelf", "a {0} {1} in a {0} coat", "a {0} {1} that isn't wet"]
    assert prompts.classes == {"dog6": "dog", "sloth_plushie": "stuffed animal"}


def test_cats_and_dogs_use_live_prompts_by_default(tmp_path):
    prompts = read_prompt_file(write(tmp_path / "prompts.txt", DREAMBOOTH_PROMPTS))
    assert prompts.templates("dog") == prompts.live
    assert prompts.templates("stuffed animal") == prompts.templates(None) == prompts.objects
    assert prompts.templates("horse", is_live=True) == prompts.live
    assert prompts.templates("cat", is_live=False) == prompts.objects


def test_text_files_accept_named_placeholders(tmp_path):
    prompts = read_prompt_file(write(tmp_path / "mine.txt", "# mine\n\na {token} {class} at sea\n  {0} alone \n"))
    assert prompts.objects == prompts.live == ["a {0} {1} at sea", "{0} alone"]
    assert prompts.classes == {}


def test_empty_token_leaves_a_single_space():
    assert fill("a {0} {1} on a shelf", "sks", "dog") == "a sks dog on a shelf"
    assert fill("a {0} {1} on a shelf", "", "dog") == "a dog on a shelf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog\na {0} {1}\n", r"1 of 2 prompts lack \{0\}: 'a dog'; write one prompt per line"),
        ("a {0} {2}\n{} and {0}", r"placeholders other than \{0\} and \{1\}: \{2\} in 'a \{0\} \{2\}', \{\} in"),
        ("# nothing\n", "no prompts"),
        ("prompt_list = [\n]\n", "no prompts"),
    ],
)
def test_invalid_prompts_are_reported_together(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompt_file(write(tmp_path / "prompts.txt", text))


def test_missing_or_binary_file_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts must be an existing text file, got '.*none.txt'"):
        read_prompt_file(tmp_path / "none.txt")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"must be a UTF-8 text file, got '.*picture.txt'"):
        read_prompt_file(tmp_path / "picture.txt")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\na {token} {class}\n", encoding="utf-8-sig")
    assert read_prompt_file(tmp_path / "p.txt").objects == ["a {0} {1}"]
