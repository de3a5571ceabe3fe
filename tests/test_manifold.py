def test_torch_s_own_warnings_stay_out_of_sight() -> None:
    # They come with the first derivative of a process.
    code = "import torch; from pipeline.evaluation.manifold import log_volume; log_volume(torch.sin, torch.zeros(1, 2))"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
