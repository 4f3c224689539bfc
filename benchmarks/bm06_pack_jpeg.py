"""BM6: the JPEG pack (half scale, q95) to batches of 64 at 384 pixels, random crop + mirror, 2 workers; the peers
read the photos it was made of."""

from harness import arguments, compare, finish
from loading import epoch, ffcv, image_folder, our_loader, pack_source, still
from photos import photo_tree, size_note

if __name__ == "__main__":
    a = arguments(__doc__, n=2048)
    n = 128 if a.quick else a.n
    still()
    root, rows = photo_tree("jpg", n)
    finish(
        compare(
            "BM6",
            "loader from the JPEG pack, 384 pixels, batch 64, 2 workers, random crop + mirror",
            {"PhotoLoader, JPEG pack": epoch(our_loader(pack_source(root, rows, "jpeg"), rows), n)},
            {"ImageFolder + v2": image_folder(root, n), "FFCV JPEG cache": ffcv(root, n, "jpg", 640)},
            n,
            a.repeats,
            note=size_note(root, rows),
            quick=a.quick,
            out=a.out,
        )
    )
