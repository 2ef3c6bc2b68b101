"""A model card into a repository of the hub, after it was shown what would change there."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flaxqa.errors import TryAgain, UsageError

from . import readme

NAME = "README.md"


class Repository:
    """A repository's card, as it was at one commit.

    Attributes:
      card: the card there, an empty one if it has none.
    """

    def __init__(self, repo_id: str, api: Any = None):
        """Reads the card.

        Raises:
          UsageError: there is no token, or no such repository, or it may not be read.
          DataError: the card there is broken; see `readme.parse`.
          TryAgain: the hub cannot be reached.
        """
        import huggingface_hub

        token = huggingface_hub.get_token()
        if token is None:
            raise UsageError(
                "--push needs a token of the hub that may write: `hf auth login`, or HF_TOKEN"
            )
        self.repo_id = repo_id
        self.api = huggingface_hub.HfApi(token=token) if api is None else api
        self.commit: str = self.asked(lambda: self.api.model_info(repo_id).sha)
        self.card = readme.parse(self.content(), f"{NAME} of {repo_id}")

    def content(self) -> bytes:
        from huggingface_hub import errors

        def fetched() -> bytes:
            try:
                path = self.api.hf_hub_download(self.repo_id, NAME, revision=self.commit)
            except errors.LocalEntryNotFoundError:  # which the hub's library counts as one, too
                raise
            except errors.EntryNotFoundError:
                return b""
            return Path(path).read_bytes()

        return self.asked(fetched)

    def difference(self, content: bytes) -> str:
        """What the card's new content would change, as a unified diff; "" for nothing."""
        old, new = (each.decode().splitlines(keepends=True)
                    for each in (readme.whole(self.card), content))  # fmt: skip
        told = f"{self.repo_id}/{NAME}"
        lines = difflib.unified_diff(old, new, told, f"{told} (new)")
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def put(self, content: bytes) -> str:
        """Commits the card and returns the address of the commit.

        Raises:
          UsageError: the hub refuses it.
          TryAgain: somebody else has committed meanwhile, or the hub cannot be reached.
        """
        return self.asked(lambda: str(self.api.upload_file(
            path_or_fileobj=content, path_in_repo=NAME, repo_id=self.repo_id,
            commit_message="Update the model card with flaxqa", parent_commit=self.commit,
        )))  # fmt: skip

    def asked(self, ask: Callable[[], Any]) -> Any:
        """What the hub says."""
        from huggingface_hub import errors

        where = f"the repository {self.repo_id}"
        try:
            return ask()
        except errors.HFValidationError as error:
            raise UsageError(f"{self.repo_id!r} is no id of the hub: {error}") from error
        except errors.RepositoryNotFoundError as error:
            raise UsageError(f"the hub has no model {self.repo_id}, or the token may not see it; "
                             "make it on the hub first") from error  # fmt: skip
        except errors.HfHubHTTPError as error:
            code = getattr(error.response, "status_code", None)
            if code == 412:
                raise TryAgain(f"{where} has a new commit since its card was read") from error
            if code is not None and 400 <= code < 500 and code not in (408, 429):
                raise UsageError(f"the hub refuses it for {where}: {error}") from error
            raise TryAgain(f"{where} cannot be reached: {error}") from error
        except ValueError as error:  # metadata that the hub does not take
            raise UsageError(f"the hub refuses the card for {where}: {error}") from error
        except Exception as error:  # of the network, in the kinds of whichever library
            raise TryAgain(
                f"{where} cannot be reached ({type(error).__name__}: {error})"
            ) from error
