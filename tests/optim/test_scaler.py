from ternlm.optim.scaler import LossScaler


def test_the_first_overflow_is_forgiven_and_the_second_halves_the_scale():
    scaler = LossScaler()
    scaler.update(overflow=True)
    assert scaler.scale == 2**16
    scaler.update(overflow=True)
    assert scaler.scale == 2**15


def test_a_thousand_clean_updates_double_the_scale_and_forgive_overflows():
    scaler = LossScaler()
    scaler.update(overflow=True)
    for _ in range(1000):
        scaler.update(overflow=False)
    assert scaler.scale == 2**17
    scaler.update(overflow=True)
    assert scaler.scale == 2**17


def test_an_overflow_restarts_the_count_of_clean_updates():
    scaler = LossScaler()
    for overflow in [False] * 999 + [True] + [False] * 999:
        scaler.update(overflow)
    assert scaler.scale == 2**16


def test_the_scale_stays_in_bounds():
    scaler = LossScaler(scale=2.0, overflows=1)
    for _ in range(5):
        scaler.update(overflow=True)
    assert scaler.scale == 1.0
    scaler = LossScaler(scale=2.0**24)
    for _ in range(1000):
        scaler.update(overflow=False)
    assert scaler.scale == 2.0**24


def test_a_restored_scaler_goes_on_where_it_was():
    scaler = LossScaler()
    for overflow in (True, False, False):
        scaler.update(overflow)
    again = LossScaler()
    again.load_state_dict(scaler.state_dict())
    assert again == scaler
