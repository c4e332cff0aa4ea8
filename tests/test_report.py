"""Tables for people."""

import report


def test_the_table_has_a_line_a_data_set_and_its_columns_are_aligned():
    rows = {"DIS-VD": {"Smeasure": 0.9104, "MAE": 0.03449}, "a longer name": {"Smeasure": 1.0, "MAE": 0.0}}
    lines = report.table(rows, ["Smeasure", "MAE"]).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["DIS-VD", "0.910", "0.034"],
        ["a", "longer", "name", "1.000", "0.000"],
    ]
    assert lines[0].split() == ["dataset", "Smeasure", "MAE"]
    assert len({len(line) for line in lines}) == 1
