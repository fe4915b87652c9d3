"""Owns the target repository on the hub: its account, its visibility, and one commit with all files.

The token is read from the environment or the stored login, and sent to the hub only. Knows no source folder.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora.errors import UserError, one_line, require
from lit_qlora.storage.folders import ADAPTER_CONFIG
from lit_qlora.wording import number_of

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

Contents = dict[str, Path | bytes]
"""The files to send, by their names in the repository."""

KIND_BY_FILE = {ADAPTER_CONFIG: "adapter", "config.json": "merged model"}
"""The kind of a folder or a repository, by the file that marks it."""


class Hub:
    """A repository and the account that sends to it.

    Args:
        to: name of the repository, NAME/REPO.
        public: True if it may be visible to everybody.

    Raises:
        UserError: without a token, with one that is refused or read-only, and if the hub can't be reached.
    """

    def __init__(self, to: str, public: bool) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(to)
            is_name = to.count("/") == 1
        except HFValidationError:
            is_name = False
        require(is_name, "to", "NAME/REPO, as in ann/my-adapter", to)
        token = get_token()
        if not token:
            raise UserError(
                "push: no token of the hub",
                remedy="set HF_TOKEN in the environment to one that may write, or log in with 'hf auth login'",
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise UserError(
                "push: the token of the hub (HF_TOKEN or the stored login) holds invalid characters", remedy="renew it"
            )
        self.to, self.public = to, public
        self._api = HfApi(token=token)
        with _hub_errors(to, token):
            account = self._api.whoami()
        self._token = token
        self.account = str(account["name"])
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"push: the token of {self.account} may only read", remedy="make one that may write")
        self._there = self._look()

    def _look(self) -> "ModelInfo | None":
        """The repository on the hub; None if there is none, or none visible to this account."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _hub_errors(self.to, self._token):
            try:
                return self._api.model_info(self.to)
            except RepositoryNotFoundError:
                return None

    @property
    def _files(self) -> set[str]:
        return {file.rfilename for file in self._there.siblings or ()} if self._there else set()

    def check(self, kind: str) -> None:
        """Check that the repository may get what is sent.

        Args:
            kind: one of `KIND_BY_FILE`.

        Raises:
            UserError: if a private push would be public, or two kinds would mix.
        """
        if self._there and not self._there.private and not self.public:
            raise UserError(
                f"{self.to} is there and public",
                option="to",
                remedy="make it private on the hub, take another name, or give --public",
            )
        for name, other in KIND_BY_FILE.items():
            if other != kind and name in self._files:
                # transformers would apply the adapter to the merged model.
                raise UserError(
                    f"{self.to} holds another kind ({name})",
                    option="to",
                    remedy=f"give the {kind} a repository of its own",
                )

    def effect(self, contents: Iterable[str]) -> str:
        """Who will see what is sent, and how many existing files are replaced, in words.

        Args:
            contents: the names of the files to send.
        """
        private = self._there.private if self._there else not self.public
        seen = "private" if private else "PUBLIC, for everybody to see"
        if self._there is None:
            return f"{seen}, to be created"
        num_replaced = len(self._files & set(contents))
        return f"{seen}, is there; {num_replaced} of its {number_of(len(self._files), 'files')} replaced"

    def send(self, contents: Contents, message: str, check: Callable[[], None]) -> str:
        """Send everything in one commit. After an interruption, uploaded files are not sent again.

        Args:
            contents: files by their names.
            message: message of the commit.
            check: called before the commit, once the large files are uploaded; may raise.

        Returns:
            The result in words.

        Raises:
            UserError: if it was not sent; the repository is unchanged then.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import enable_progress_bars

        if sys.stderr.isatty():
            enable_progress_bars()
        with _hub_errors(self.to, self._token):
            if self._there is None:
                self._api.create_repo(self.to, private=not self.public, exist_ok=True)
        before = self._look()
        if before is None or (not before.private and not self.public):  # somebody else was quicker
            raise UserError(
                f"{self.to} is not as it was asked for", option="to", remedy="nothing was sent, check it on the hub"
            )
        with _hub_errors(self.to, self._token):
            operations = [CommitOperationAdd(name, part) for name, part in contents.items()]
            self._api.preupload_lfs_files(self.to, operations, free_memory=False)
            check()
            commit = self._api.create_commit(self.to, operations, commit_message=message)
        if commit.oid == before.sha:
            return f"all of it was there already: {self._api.endpoint}/{self.to}"
        seen = "private" if before.private else "public"
        return f"sent, {seen}: {self._api.endpoint}/{self.to}"


@contextmanager
def _hub_errors(to: str, token: str) -> Iterator[None]:
    """Raises UserError for any error of the hub's library, whose classes depend on its version."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while _status(cause) is None and cause.__cause__ is not None:  # "Error while uploading", which says nothing
            cause = cause.__cause__
        reason = one_line(f"{type(cause).__name__}: {cause}".replace(token, "(token)"))
        raise _refusal(_status(cause), to, reason) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _refusal(status: int | None, to: str, reason: str) -> UserError:
    if status == 401:
        what = "push: the hub does not accept the token"
        return UserError(what, remedy="renew HF_TOKEN or, without it, the stored login")
    if status == 403:
        return UserError(f"push: this account, or its token, may not write to {to} (403): {reason}")
    if status is not None and status < 500 and status != 429:
        return UserError(f"push: the hub refused it ({status}): {reason}")
    what = "push: the hub can't be reached or broke off"
    return UserError(what, remedy=f"give the same command again, it resumes: {reason}")
