from app import reply


def test_greets_at_the_root():
    assert reply("/") == (200, {"message": "Hello from Python"})


def test_answers_404_elsewhere():
    assert reply("/missing")[0] == 404
