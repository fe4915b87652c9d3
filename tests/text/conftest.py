import pytest
from hypothesis import strategies as st

from lit_qlora.text.conversation import Conversation, Turn

MARKS = ("### Human:", "### Assistant:", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>")


@pytest.fixture(scope="session")
def conversations() -> st.SearchStrategy[Conversation]:
    """Any number of turns, answered or open, with or without a system text, of any text without marks."""
    texts = (
        st.text(st.characters(codec="utf-8") | st.sampled_from("#[]<>/ \n\"'"), min_size=1)
        .map(str.strip)
        .filter(lambda text: text and not any(mark in text for mark in MARKS))
    )

    def talk(said: list[str], system: str | None) -> Conversation:
        turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(said))
        return Conversation(tuple(turns), system)

    return st.builds(talk, st.lists(texts, min_size=1, max_size=6), st.none() | texts)
