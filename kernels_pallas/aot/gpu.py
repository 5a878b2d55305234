def compile_lowered(lowered, chip):
    raise NotImplementedError


def devices(chip):
    raise NotImplementedError
