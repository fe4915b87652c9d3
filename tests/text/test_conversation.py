import pytest

from lit_qlora.text.conversation import Conversation, Turn


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "turn 1 is the assistant's, expected the user's"),
        (["user", "user"], "turn 2 is the user's, expected the assistant's"),
        (["user", "text"], "turn 2 is the text's, expected the assistant's"),
        ([], "a conversation needs at least one turn"),
    ],
)
def test_turns_alternate_the_user_first(roles, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Conversation(tuple(Turn(role, "a") for role in roles))


def test_a_turn_is_never_blank():
    with pytest.raises(ValueError, match=r"^a turn of the user .*empty$"):
        Turn("user", " \n")
