"""`ggtool quantize` as the command runs it, in this process."""

from ggtool.calibration.make_folder import QuantizeRequest, make_folder
from ggtool.cli.console import notifier
from ggtool.cli.quantize import print_folder


def quantize(request: QuantizeRequest, *, as_json: bool, quiet: bool) -> None:
    made = make_folder(request, notifier(quiet=quiet), lambda stage, done, total: None)
    print_folder(made, as_json=as_json)
