"""Device choice without importing paddle."""

import pytest

from finetune.machine import device


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Describe a machine: whether Paddle is the CUDA build, and how many NVIDIA devices there are."""

    def describe(*, gpu_build: bool, num_devices: int) -> None:
        nodes = [f"/dev/nvidia{index}" for index in range(num_devices)]
        monkeypatch.setattr(device, "has_gpu_build", lambda: gpu_build)
        monkeypatch.setattr(device.glob, "glob", lambda _: nodes)
        monkeypatch.setattr(device, "_WSL_NODE", str(tmp_path / "none"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return describe


@pytest.mark.parametrize(
    ("listed", "num_visible"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("1,0", 2),
        ("0,-1,1", 1),
        ("5", 0),
        ("GPU-8932f937", 1),
        ("0, 1", 2),
        ("nonsense", 0),
    ],
)
def test_visible_devices_are_counted_as_cuda_counts_them(machine, listed, num_visible):
    machine(gpu_build=True, num_devices=2)
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert device.count_visible_gpus(environ) == num_visible


def test_no_device_means_none_visible_whatever_the_environment_says(machine):
    machine(gpu_build=True, num_devices=0)
    assert device.count_visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}) == 0


@pytest.mark.parametrize(
    ("gpu_build", "num_devices", "expected"), [(True, 1, "gpu"), (True, 0, "cpu"), (False, 1, "cpu")]
)
def test_gpu_is_the_default_only_with_cuda_build_and_device(machine, gpu_build, num_devices, expected):
    machine(gpu_build=gpu_build, num_devices=num_devices)
    assert device.detect_device() == expected


def test_hidden_devices_give_cpu(machine, monkeypatch):
    machine(gpu_build=True, num_devices=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.detect_device() == "cpu"


def test_a_requested_device_is_kept():
    assert device.detect_device("gpu:3") == "gpu:3"
    assert device.device_kind("gpu:3") == "gpu"


def test_gpu_on_the_cpu_build_is_a_fault_with_remedy(machine):
    machine(gpu_build=False, num_devices=1)
    fault = device.find_device_fault("gpu")
    assert 'device is "gpu"' in fault and "CPU build" in fault and "--device cpu" in fault


def test_gpu_without_a_device_is_a_fault_with_remedy(machine, monkeypatch):
    machine(gpu_build=True, num_devices=0)
    assert "none is present" in device.find_device_fault("gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert 'CUDA_VISIBLE_DEVICES="7" shows none' in device.find_device_fault("gpu")


def test_index_beyond_the_visible_devices_is_a_fault(machine):
    machine(gpu_build=True, num_devices=2)
    assert device.find_device_fault("gpu:1") is None
    assert "use gpu:0 to gpu:1" in device.find_device_fault("gpu:2")


@pytest.mark.parametrize("requested", ["cuda", "gpu:", "gpu:x", "tpu:0"])
def test_unknown_devices_are_faults_that_list_the_known_ones(requested):
    assert "choose one of cpu, gpu" in device.find_device_fault(requested)


@pytest.mark.parametrize("requested", [None, "cpu", "npu:0"])
def test_other_devices_pass(requested):
    assert device.find_device_fault(requested) is None


@pytest.mark.parametrize(
    ("requested", "num_processes", "used"),
    [("cpu", 1, "cpu"), ("gpu", 1, "gpu"), ("gpu:1", 1, "gpu:1"), ("gpu:1", 2, "gpu"), ("cpu", 2, "cpu")],
)
def test_paddle_is_put_on_the_device(monkeypatch, requested, num_processes, used):
    import paddle

    seen = []
    monkeypatch.setattr(paddle, "set_device", seen.append)
    device.use_device(requested, num_processes)
    assert seen == [used]
