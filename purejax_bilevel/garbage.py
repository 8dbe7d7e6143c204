"""Collection of garbage, put off while a script starts: imports and traces make hundreds of thousands of objects that
stay, and looking through all of them again and again takes a tenth of the time until the first step."""

import gc

_put_off = False  # by a script; a process of somebody else is left alone


def put_off() -> None:
    """No collection until `collect_from_now_on`. To be called by scripts."""
    global _put_off
    _put_off = True
    gc.disable()


def collect_from_now_on() -> None:
    """Collects again if that was put off, without what is there by now."""
    global _put_off
    if _put_off:
        _put_off = False
        gc.freeze()
        gc.enable()
