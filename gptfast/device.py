"""Which device a run or a model is on."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    # Not every accelerator: the reference's float64 sums rule out Apple's, for one.
    known = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(known[0])
    if name not in known:
        raise ValueError(f"device must be auto or one of {', '.join(known)}, got {name!r}")
    return torch.device(name)
