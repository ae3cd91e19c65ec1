"""The doctor reports every section."""

from crescendo.experiments import doctor


def test_the_doctor_names_versions_devices_and_storage(capsys):
    doctor.main([])
    out = capsys.readouterr().out
    for text in ("Versions", "jaxlib", "Devices", "cpu:0", "Kernels", "Storage", "compiled programs"):
        assert text in out
    assert "no answer" not in out
