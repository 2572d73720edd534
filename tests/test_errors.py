"""How a mistake of the user's leaves an entry point."""

import pytest

from specjax.errors import InputError, exit_on_input_error


def test_input_error_becomes_one_line_on_stderr_and_status_2(capsys):
    @exit_on_input_error
    def main() -> None:
        raise InputError("file a.json: field hidden_size is -1; give a positive number")

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", "error: file a.json: field hidden_size is -1; give a positive number\n")


def test_other_errors_keep_their_traceback():
    @exit_on_input_error
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main()


def test_arguments_reach_the_entry_point():
    seen = []

    @exit_on_input_error
    def main(argv: list[str], *, resume: bool) -> None:
        seen.append((argv, resume))

    main(["config.yaml"], resume=True)
    assert seen == [(["config.yaml"], True)]
    assert main.__name__ == "main"
