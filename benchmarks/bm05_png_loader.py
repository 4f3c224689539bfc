"""BM5: PNG files as AI Hub delivers them to batches of 64 at 384 pixels, random crop + mirror, 2 workers."""

from harness import arguments, compare, finish
from loading import dali, epoch, image_folder, our_loader, still
from photos import photo_tree, size_note

if __name__ == "__main__":
    a = arguments(__doc__, n=2048)
    n = 64 if a.quick else a.n
    still()
    root, rows = photo_tree("png", n)
    finish(
        compare(
            "BM5",
            "PNG loader, as delivered, 384 pixels, batch 64, 2 workers, random crop + mirror",
            {
                "PhotoLoader, threads": epoch(our_loader(root, rows), n),
                "PhotoLoader, processes": epoch(our_loader(root, rows, engine="processes"), n),
            },
            {"ImageFolder + v2": image_folder(root, n), "DALI CPU": dali(root, rows, n)},
            n,
            a.repeats,
            note=size_note(root, rows),
            quick=a.quick,
            out=a.out,
        )
    )
