// Keeps the "LCM Distil" tab up to date while it is open: presses its Refresh button every two seconds.
onUiLoaded(() => {
    setInterval(() => {
        const tab = gradioApp().querySelector("#tab_lcm_distil");
        const button = gradioApp().querySelector("#lcm_distil_refresh");
        if (!document.hidden && tab && tab.style.display !== "none" && button) button.click();
    }, 2000);
});
