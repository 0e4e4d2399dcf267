def stacklevel_of_caller():
    return 5
