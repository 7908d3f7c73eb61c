import pytest

from snella_lab.recipes.dreambooth.data import fill, read_prompt_file

GOOGLE = """Classes

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


def test_both_lists_and_the_classes_of_dreambooth_are_read(tmp_path):
    found = read_prompt_file(write(tmp_path / "prompts_and_classes.txt", GOOGLE))
    assert found.objects == ["a {0} {1} on a shelf", "a shiny {0} {1}"]
    assert found.live == ["a {0} {1} on a shelf", "a {0} {1} in a {0} coat", "a {0} {1} that isn't wet"]
    assert found.classes == {"dog6": "dog", "sloth_plushie": "stuffed animal"}


def test_cats_and_dogs_get_the_prompts_for_animals_unless_told_otherwise(tmp_path):
    found = read_prompt_file(write(tmp_path / "prompts.txt", GOOGLE))
    assert found.templates("dog") == found.live
    assert found.templates("stuffed animal") == found.templates(None) == found.objects
    assert found.templates("horse", is_live=True) == found.live
    assert found.templates("cat", is_live=False) == found.objects


def test_plain_lines_may_name_the_places(tmp_path):
    found = read_prompt_file(write(tmp_path / "mine.txt", "# mine\n\na {token} {class} at sea\n  {0} alone \n"))
    assert found.objects == found.live == ["a {0} {1} at sea", "{0} alone"]
    assert found.classes == {}


def test_an_empty_word_leaves_a_single_blank():
    assert fill("a {0} {1} on a shelf", "sks", "dog") == "a sks dog on a shelf"
    assert fill("a {0} {1} on a shelf", "", "dog") == "a dog on a shelf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog\na {0} {1}\n", r"1 of 2 prompts have no \{0\}: 'a dog'; write the subject's token as \{0\}"),
        ("a {0} {2}\n{} and {0}", r"placeholders other than \{0\} and \{1\}: \{2\} in 'a \{0\} \{2\}', \{\} in"),
        ("# nothing\n", "it has no prompts"),
        ("prompt_list = [\n]\n", "it has no prompts"),
    ],
)
def test_prompts_that_cannot_serve_are_named_together(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompt_file(write(tmp_path / "prompts.txt", text))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts must be an existing text file, got '.*none.txt'"):
        read_prompt_file(tmp_path / "none.txt")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"must be a UTF-8 text file, got '.*picture.txt'"):
        read_prompt_file(tmp_path / "picture.txt")
